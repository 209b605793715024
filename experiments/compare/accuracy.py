"""How far a candidate is from the float32 reference, on inputs that no timing has seen."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments.compare.routings import Routing
from pallas_kernels.decode_experts import ExpertWeights

# What a layout must stay within, as ||y - ref|| / ||ref||. The first is bf16's own rounding of the
# output, 1.66e-3 on average, and a little more; nothing may be rounded to bf16 before it.
LARGEST_ERROR = {"bfloat16": 1.8e-3, "float32": 1e-4}
# The average moves by a tenth for a few hundred outputs: there, rounding alone is the measure.
_OVER_ROUNDING = 1.05


class Errors(NamedTuple):
    """||y - ref|| / ||ref|| over all routings together, and the largest |y - ref|.

    `rounding` is the relative error that the reference itself has once rounded to y's dtype.
    """

    relative: float
    largest: float
    rounding: float


def measure(
    layer: Callable,
    weights: ExpertWeights,
    xs: Sequence[jax.Array],
    routings: Sequence[Routing],
    references: Sequence[np.ndarray],
) -> Errors:
    """Runs `layer` on each (x, routing) and compares with that reference, [T, H] float32 each.

    Raises:
      AssertionError: an output is not finite.
    """
    outputs = [
        layer(x, weights, jnp.asarray(routing.expert_ids), jnp.asarray(routing.expert_weights))
        for x, routing in zip(xs, routings, strict=True)
    ]
    dtype = outputs[0].dtype
    y = np.stack([np.asarray(output, np.float64) for output in outputs])
    reference = np.stack(references).astype(np.float64)
    chex.assert_equal_shape([y, reference])
    chex.assert_tree_all_finite(y)
    difference = y - reference
    rounded = reference.astype(dtype).astype(np.float64)
    size = np.linalg.norm(reference)
    return Errors(
        relative=float(np.linalg.norm(difference) / size),
        largest=float(np.abs(difference).max()),
        rounding=float(np.linalg.norm(rounded - reference) / size),
    )


def check_layout(name: str, errors: Errors, before_rounding: float | None, dtype: str) -> None:
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
