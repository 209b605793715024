"""A decode step with the Pallas backend lowers for CUDA, on a machine without a GPU."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.cache import init_cache
from moe_jax.parameters import from_arrays, parameter_shapes
from moe_jax.presets import PRESETS
from tests.pallas_kernels.machine import kernels_of, lower_for_cuda


@pytest.mark.parametrize(
    ("B", "kernels"),
    [
        (1, ["output_major_gate_up", "output_major_down"]),
        (16, ["gather_rows", "expert_major_gate_up", "expert_major_down"]),
    ],
)
def test_a_decode_step_takes_the_kernels_on_cuda(B, kernels):
    config = PRESETS["tiny"]

    def step(arrays, ids, cache):
        return from_arrays(config, arrays)(ids, cache=cache, platform="cuda").logits

    cache = jax.eval_shape(lambda: init_cache(config, B, 32))
    ids = jax.ShapeDtypeStruct((B, 1), jnp.int32)
    lowered = lower_for_cuda(step, parameter_shapes(config), ids, cache)
    assert kernels_of(lowered) == kernels  # equal layers share a function
    assert "ragged_dot" not in lowered
