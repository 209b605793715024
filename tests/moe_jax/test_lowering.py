"""A decode step with the Pallas backend lowers for CUDA, on a machine without a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from moe_jax.cache import init_cache
from moe_jax.parameters import from_arrays, parameter_shapes
from moe_jax.presets import PRESETS
from tests.pallas_kernels.machine import lower_for_cuda


@pytest.mark.parametrize(("B", "layout"), [(1, "output_major"), (16, "expert_major")])
def test_a_decode_step_takes_the_kernels_on_cuda(B, layout):
    config = PRESETS["tiny"]

    def step(arrays, ids, cache):
        return from_arrays(config, arrays)(ids, cache=cache, platform="cuda").logits

    cache = jax.eval_shape(lambda: init_cache(config, B, 32))
    ids = jax.ShapeDtypeStruct((B, 1), jnp.int32)
    lowered = lower_for_cuda(step, parameter_shapes(config), ids, cache)
    assert lowered.count("mosaic_gpu_v2") >= 2  # gate/up and down; equal layers share a function
    assert f"{layout}_gate_up" in lowered
    assert "ragged_dot" not in lowered


@pytest.mark.parametrize("scope", ["moe", "attention"])
def test_a_superkernel_of_the_experts_is_one_launch(scope):
    config = dataclasses.replace(
        PRESETS["tiny"], enable_superkernel=True, superkernel_scope=scope, num_hidden_layers=1
    )

    def step(arrays, ids, cache):
        return from_arrays(config, arrays)(ids, cache=cache, platform="cuda").logits

    cache = jax.eval_shape(lambda: init_cache(config, 2, 32))
    ids = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    lowered = lower_for_cuda(step, parameter_shapes(config), ids, cache)
    assert lowered.count("mosaic_gpu_v2") == (1 if scope == "moe" else 2)
    assert ("streamed" in lowered) == (scope == "moe")
