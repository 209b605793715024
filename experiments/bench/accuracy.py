"""How far a layer is from the float32 reference, and whether it gives the same bits again."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import numpy as np

from experiments.bench.inputs import Case

# bf16's own rounding of an output, as ||y - ref|| / ||ref||: what no bf16 output is below.
BF16_ROUNDING = 1.66e-3
# What a layout must stay within. The first is that rounding and a little more; nothing may be
# rounded to bf16 before it.
LARGEST_ERROR = {"bfloat16": 1.8e-3, "float32": 1e-4}
# The average moves by a tenth for a few hundred outputs: there, rounding alone is the measure.
_OVER_ROUNDING = 1.05

REPEATS = 20
# Tokens that are also computed alone.
_ALONE = 4


class OutputErrors(NamedTuple):
    """||y - ref|| / ||ref|| over all cases together, and the largest |y - ref|.

    `rounding` is the relative error that the reference itself has once rounded to y's dtype.
    """

    relative: float
    largest: float
    rounding: float


def measure_errors(
    layer: Callable, cases: Sequence[Case], references: Sequence[np.ndarray]
) -> OutputErrors:
    """Runs `layer` on each case and compares with that reference, [T, H] float32 each.

    Raises:
      AssertionError: an output is not finite.
    """
    outputs = [layer(*case) for case in cases]
    dtype = outputs[0].dtype
    y = np.stack([np.asarray(output, np.float64) for output in outputs])
    reference = np.stack(references).astype(np.float64)
    chex.assert_equal_shape([y, reference])
    chex.assert_tree_all_finite(y)
    difference = y - reference
    rounded = reference.astype(dtype).astype(np.float64)
    size = np.linalg.norm(reference)
    return OutputErrors(
        relative=float(np.linalg.norm(difference) / size),
        largest=float(np.abs(difference).max()),
        rounding=float(np.linalg.norm(rounded - reference) / size),
    )


def check_layout(
    name: str, errors: OutputErrors, before_rounding: float | None, dtype: str
) -> None:
    """Raises an AssertionError if a layout's error is above what it must stay within."""
    for error, kind in ((errors.relative, dtype), (before_rounding, "float32")):
        if error is None:
            continue
        bound = LARGEST_ERROR[kind]
        if kind == "bfloat16":
            bound = max(bound, _OVER_ROUNDING * errors.rounding)
        try:
            chex.assert_scalar_in(error, 0.0, bound)
        except AssertionError:
            raise AssertionError(
                f"{name}: relative error {error:.2e} of the {kind} output is above {bound:.1e}"
            ) from None


def same_bits_repeated(layer: Callable, case: Case) -> bool:
    """Whether REPEATS runs on one input agree in every bit."""
    first = np.asarray(layer(*case))
    return all(np.array_equal(np.asarray(layer(*case)), first) for _ in range(REPEATS - 1))


def same_bits_alone(layer: Callable, case: Case, layer_alone: Callable | None = None) -> bool:
    """Whether tokens have the same bits in the batch, in the batch turned round, and alone (T = 1).

    The first and the last few tokens are run alone, by `layer_alone` if that is another function.
    """
    together = np.asarray(layer(*case))
    turned = np.asarray(layer(*case.tokens(slice(None, None, -1))))[::-1]
    if not np.array_equal(turned, together):
        return False
    T = case.x.shape[0]
    some = sorted({*range(min(T, _ALONE // 2)), *range(max(0, T - _ALONE // 2), T)})
    alone: Callable[..., jax.Array] = layer_alone or layer
    return all(
        np.array_equal(np.asarray(alone(*case.tokens(slice(t, t + 1)))), together[t : t + 1])
        for t in some
    )
