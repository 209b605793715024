"""Backends of the experts on trial: the same greedy tokens? How long does a layer take?

Two bfloat16 computations round differently, and where the two highest logits are closer than that
they may choose differently. So for each row the first token that differs is looked at, with the
reference backend alone: a float32 copy of the model says how far apart the two tokens' logits
really are, and the model as it is, in bfloat16, how far rounding moves logits. What either of the
two backends computed has no say in it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from experiments.bench.inputs import draw_weights
from moe_jax.config import Qwen3MoeConfig
from moe_jax.dispatch import BackendChoice, Request, record_choices
from moe_jax.experts import experts
from moe_jax.generation import generate
from moe_jax.model import Qwen3Moe
from moe_jax.parameters import from_arrays, to_arrays
from moe_jax.routing import route
from pallas_kernels.decode_experts import ExpertShapes

# Of a chain: calls hide each other's launches, so two are as good as many.
_STEPS = 2
_REPEATS = 7


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


def compare_backends(
    model: Qwen3Moe, prompts: Sequence[Sequence[int]], backends: tuple[str, str], new_tokens: int
) -> Agreement:
    """Generates with the same model object and each backend, and judges what differs.

    Args:
      model: in bfloat16; a float32 copy must fit beside it.
      prompts: rows of token ids.
      backends: two names in EXPERTS_BACKENDS, or "auto", for prefill and decode steps.
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
            judge = judge or _Judge(model)
            differences.append(judge.look(row, apart[0], prompts[row], one, other))
    return Agreement(tokens=tokens, compared=compared, differences=differences, record=record)


class _Judge:
    """The model's logits and those of a float32 copy, by the reference backend alone."""

    def __init__(self, model: Qwen3Moe):
        def logits(arrays, ids):
            call = from_arrays(model.config, arrays)
            return call(ids, experts_backend="reference").logits

        self._logits = jax.jit(logits)
        self._as_it_is = to_arrays(model)
        self._float32 = {n: array.astype(jnp.float32) for n, array in self._as_it_is.items()}

    def look(
        self, row: int, index: int, prompt: Sequence[int], one: list[int], other: list[int]
    ) -> Difference:
        """Judges the tokens at `index`; what `one` goes on with does not reach back to it."""
        ids = jnp.asarray([[*prompt, *one]], jnp.int32)
        before = len(prompt) + index - 1
        truth, rounded = (
            np.asarray(self._logits(arrays, ids)[0, before], np.float64)
            for arrays in (self._float32, self._as_it_is)
        )
        tokens = one[index], other[index]
        return Difference(
            row=row,
            index=index,
            tokens=tokens,
            gap=float(abs(truth[tokens[0]] - truth[tokens[1]])),
            error=float(np.abs(rounded - truth).max()),
        )


class TimedBackend(NamedTuple):
    """One backend at one T.

    Attributes:
      T: tokens.
      backend: its name.
      milliseconds: of a layer in a chain; None if the backend cannot do this.
      temporaries_mb: what XLA allocates beside arguments and result.
      error: ||y - first|| / ||first||, against the first backend's result.
      lacks: why not, if it cannot.
    """

    T: int
    backend: str
    milliseconds: float | None = None
    temporaries_mb: float | None = None
    error: float | None = None
    lacks: str = ""


def time_backends(
    config: Qwen3MoeConfig,
    dtype,
    backends: Sequence[str],
    tokens: Sequence[int],
    seed: int,
    *,
    gradients: bool,
) -> Iterator[TimedBackend]:
    """Times the experts of a random layer of this config on the default device.

    For prefill's numbers of tokens: all steps read the same weights, which a decode step does not
    (experiments.compare_layouts times that). With gradients a call is of the phase "training" and
    takes those to x and to all weights, and `error` is of the gradient to x.
    """
    E, K = config.num_experts, config.num_experts_per_tok
    H, I = config.hidden_size, config.moe_intermediate_size
    keys = jax.random.split(jax.random.key(seed), 3)
    weights = draw_weights(keys[0], ExpertShapes(E=E, K=K, H=H, I=I))
    weights = jax.tree.map(lambda leaf: leaf.astype(dtype), weights)
    for T in tokens:
        x = jax.random.normal(keys[1], (T, H), dtype)
        routing = route(jax.random.normal(keys[2], (T, E)), K, norm_topk_prob=True)
        inputs = [(weights, routing.ids, routing.weights)] * _STEPS
        first = None
        for backend in backends:
            call = _call(config.hidden_act, backend, gradients)

            def step(carry, inputs, call=call):
                found, *more = call(carry[0], *inputs)
                return timing.after(carry[0], more), found.astype(carry[1].dtype)

            try:
                chain = timing.Chain(step, (x, jnp.zeros_like(x)), inputs)
            except NotImplementedError as error:
                yield TimedBackend(T, backend, lacks=str(error))
                continue
            taken = timing.measure_step(chain, _REPEATS)
            y = chain.result()[1][-1]
            first = y if first is None else first
            yield TimedBackend(
                T,
                backend,
                taken.us / 1e3,
                chain.temporary_bytes / 1e6,
                float(np.linalg.norm(y - first) / np.linalg.norm(first)),
            )


def _call(activation: str, backend: str, gradients: bool) -> Callable:
    """(x, weights, ids, expert_weights) -> a tuple, the experts' output or the gradients."""
    phase = "training" if gradients else "prefill"
    run = functools.partial(experts, activation=activation, backend=backend, phase=phase)
    if not gradients:
        return lambda *arrays: (run(*arrays),)

    def loss(x, weights, ids, expert_weights):
        return jnp.sum(jnp.square(run(x, weights, ids, expert_weights).astype(jnp.float32)))

    return jax.grad(loss, argnums=(0, 1, 3))
