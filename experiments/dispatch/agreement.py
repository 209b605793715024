"""Do two backends generate the same greedy tokens? Where they do not, float32 is the judge.

Two bfloat16 computations round differently, and where the two highest logits are closer than that
they may choose differently. So for each row the first token that differs is looked at, with the
reference backend alone: a float32 copy of the model says how far apart the two tokens' logits
really are, and the model as it is, in bfloat16, how far rounding moves logits. What either of the
two backends computed has no say in it.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.dispatch import BackendChoice, Request, record_choices
from moe_jax.generation import generate
from moe_jax.model import Qwen3Moe
from moe_jax.parameters import from_arrays, to_arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """The first place where a row's tokens differ.

    Attributes:
      row, index: which token.
      tokens: what each backend chose.
      gap: how far apart the float32 logits of the two are.
      error: the largest difference, over the vocabulary, between the reference backend's logits
        in the model's dtype and in float32.
    """

    row: int
    index: int
    tokens: tuple[int, int]
    gap: float
    error: float

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains it: each of the two logits may be off by `error`."""
        return self.gap <= 2 * self.error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """What came out.

    Attributes:
      tokens: backend -> each row's tokens.
      compared: how many tokens were compared: each row's up to its first difference.
      differences: of each row that has one.
      record: what each call of an op chose.
    """

    tokens: dict[str, list[list[int]]]
    compared: int
    differences: list[Difference]
    record: list[tuple[Request, BackendChoice]]

    @property
    def holds(self) -> bool:
        """Whether all tokens are the same but for ties."""
        return all(difference.is_tie for difference in self.differences)


def compare(
    model: Qwen3Moe, prompts: Sequence[Sequence[int]], backends: tuple[str, str], new_tokens: int
) -> Agreement:
    """Generates with the same model object and each backend, and judges what differs.

    Args:
      model: in bfloat16; a float32 copy must fit beside it.
      prompts: rows of token ids.
      backends: two names in EXPERTS_BACKENDS, for decode steps and, where they can, prefill.
      new_tokens: for each row.
    """
    with record_choices() as record:
        tokens = {
            name: generate(
                model, prompts, max_new_tokens=new_tokens, prefill_backend=name, decode_backend=name
            ).tokens
            for name in backends
        }
    compared, differences, judge = 0, [], None
    for row, (one, other) in enumerate(zip(*tokens.values(), strict=True)):
        apart = [n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        compared += (apart[0] if apart else new_tokens - 1) + 1
        if apart:
            judge = judge or _in_float32(model)
            before = [*prompts[row], *one[: apart[0]]]
            differences.append(_judged(model, judge, before, row, apart[0], one, other))
    return Agreement(tokens=tokens, compared=compared, differences=differences, record=record)


def _judged(model, judge, before, row, index, one, other) -> Difference:
    def logits(model):
        call = jax.jit(
            lambda arrays, ids: (
                from_arrays(model.config, arrays)(
                    ids, logits_to_keep=1, experts_backend="reference"
                ).logits
            )
        )
        ids = jnp.asarray([before], jnp.int32)
        return np.asarray(call(to_arrays(model), ids)[0, -1], np.float64)

    truth = logits(judge)
    tokens = one[index], other[index]
    return Difference(
        row=row,
        index=index,
        tokens=tokens,
        gap=float(abs(truth[tokens[0]] - truth[tokens[1]])),
        error=float(np.abs(logits(model) - truth).max()),
    )


def _in_float32(model: Qwen3Moe) -> Qwen3Moe:
    arrays = {name: array.astype(jnp.float32) for name, array in to_arrays(model).items()}
    return from_arrays(model.config, arrays)
