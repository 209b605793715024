"""Random inputs of decode_experts, and what it means for an output to be right."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.bench.accuracy import LARGEST_ERROR
from experiments.bench.inputs import Case, case_specs, draw_case, jitted_reference
from pallas_kernels.decode_experts import ExpertShapes

# Relative errors against the float32 reference: before the last rounding, and after bfloat16's.
FLOAT32_BOUND = LARGEST_ERROR["float32"]
BFLOAT16_BOUND = LARGEST_ERROR["bfloat16"]

INT32_MAX = np.iinfo(np.int32).max
INT32_MIN = np.iinfo(np.int32).min


class Size(NamedTuple):
    """A batch and a layer."""

    T: int
    E: int
    K: int
    H: int
    I: int

    @property
    def shapes(self) -> ExpertShapes:
        return ExpertShapes(E=self.E, K=self.K, H=self.H, I=self.I)

    def __str__(self):
        return "-".join(f"{letter}{size}" for letter, size in self._asdict().items())


def make_case(size: Size, seed: int) -> Case:
    """As draw_case, which the experiments share."""
    return draw_case(size.shapes, size.T, seed)


def struct_case(size: Size) -> Case:
    """The same as shapes and dtypes only."""
    return case_specs(size.shapes, size.T)


def size_of_terms(case: Case) -> jax.Array:
    """[T]: the sum of the norms of a token's experts' outputs, by the float32 reference.

    A sum that all but cancels is no more exact than its terms: what assert_right takes where
    routing weights have both signs.
    """
    terms = []
    for k in range(case.expert_ids.shape[1]):
        alone = jnp.full_like(case.expert_ids, -1).at[:, k].set(case.expert_ids[:, k])
        terms.append(jnp.linalg.norm(jitted_reference(*case._replace(expert_ids=alone)), axis=1))
    return sum(terms)


def assert_right(out: jax.Array, case: Case, size: jax.Array | None = None) -> None:
    """float32 `out` is within the bound of the float32 reference, each token by itself.

    Errors are relative to `size` [T], by default the norm of the token's output.
    """
    chex.assert_shape(out, case.x.shape)
    chex.assert_type(out, jnp.float32)
    expected = jitted_reference(*case)
    chex.assert_tree_all_finite((out, expected))
    norm = jnp.linalg.norm(expected, axis=1) if size is None else size  # [T]
    error = jnp.linalg.norm(out - expected, axis=1)
    # A row of zeros, that is of padding only, must be met exactly.
    relative = error / jnp.where(norm > 0, norm, 1e-30)
    chex.assert_trees_all_close(relative, jnp.zeros_like(relative), rtol=0, atol=FLOAT32_BOUND)


def assert_same_bits(found: jax.Array, expected: jax.Array) -> None:
    """Not one bit differs: 0.0 is not -0.0 here, and a NaN equals itself."""
    chex.assert_equal_shape_prefix([found, expected], found.ndim)
    assert found.dtype == expected.dtype
    chex.assert_trees_all_equal(bits(found), bits(expected))


def bits(array: jax.Array) -> jax.Array:
    """The array's bits as integers."""
    integer = {2: jnp.int16, 4: jnp.int32}[array.dtype.itemsize]
    return lax.bitcast_convert_type(array, integer)
