"""How far two runs of the same calls are from each other, and how far they may be."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from experiments.ascend.sample import Named


class Errors(NamedTuple):
    """Relative errors, ||y - ref|| / ||ref||, of many arrays: the middle one and the largest."""

    median: float
    worst: float

    def within(self, bound: "Errors") -> bool:
        """NaN is not."""
        return self.median <= bound.median and self.worst <= bound.worst


# In bfloat16 every operation rounds to 2^-9, and two compilers sum in other orders. On the tiny
# preset, of 5 seeds, IREE 3.13's median was 0.0062 at most. A choice of the router that is all but
# a tie can turn, and then a row gets another expert: 0.056 was the worst of 360 rows.
BOUNDS = {"float32": Errors(1e-5, 1e-5), "bfloat16": Errors(0.02, 0.2)}
EQUAL = Errors(0.0, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One run, a prefill and decode steps in a row, against jax.jit.

    Attributes:
      what: what ran.
      bound: of both errors.
      logits: one error for each call and row.
      cache: one error for each call and layer's keys or values; infinite if lengths differ.
      same_tokens, tokens: of the greedy choices, how many agree.
      own_argmax: whether every token is the first of its own logits' largest.
    """

    what: str
    bound: Errors
    logits: Errors
    cache: Errors
    same_tokens: int
    tokens: int
    own_argmax: bool

    @property
    def passed(self) -> bool:
        """Whether both errors are within the bound and the tokens follow from the logits."""
        return self.logits.within(self.bound) and self.cache.within(self.bound) and self.own_argmax


def compare(
    what: str, found: Sequence[Named], expected: Sequence[Named], bound: Errors
) -> Comparison:
    """Compares results call by call; `found` may lack caches."""
    pairs = list(zip(found, expected, strict=True))
    logits = [
        relative_error(row, other)
        for one, reference in pairs
        for row, other in zip(one["logits"], reference["logits"], strict=True)
    ]
    cache = [error for one, reference in pairs for error in _cache_errors(one, reference)]
    tokens = np.stack([[one["next_ids"], other["next_ids"]] for one, other in pairs])
    argmax = np.stack([one["logits"].argmax(axis=-1) for one in found])
    return Comparison(
        what=what,
        bound=bound,
        logits=_errors(logits),
        cache=_errors(cache),
        same_tokens=int(np.sum(tokens[:, 0] == tokens[:, 1])),
        tokens=tokens[:, 0].size,
        own_argmax=bool(np.all(tokens[:, 0] == argmax)),
    )


def _errors(errors: list[float]) -> Errors:
    return Errors(float(np.median(errors)), float(np.max(errors)))  # NaN of a NaN


def relative_error(y: np.ndarray, reference: np.ndarray) -> float:
    """||y - reference|| / ||reference||, in float64; 0 only if they are equal, bit for bit."""
    if y.tobytes() == reference.tobytes():
        return 0.0
    y, reference = y.astype(np.float64), reference.astype(np.float64)
    error = float(np.linalg.norm(y - reference) / np.linalg.norm(reference))
    return error or np.finfo(np.float64).tiny  # zeros of another sign


def _cache_errors(found: Named, expected: Named) -> Iterator[float]:
    for name in found:
        if name.startswith(("cache/keys/", "cache/values/")):
            yield relative_error(found[name], expected[name])
    if "cache/lengths" in found and not np.array_equal(
        found["cache/lengths"], expected["cache/lengths"]
    ):
        yield np.inf
