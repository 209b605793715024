"""A decode step in the kernels lowers for CUDA, on a machine without a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from moe_jax.cache import init_cache
from moe_jax.parameters import from_arrays, parameter_shapes
from moe_jax.presets import PRESETS
from tests.pallas_kernels.machine import kernels_of, lower_for_cuda

TINY = PRESETS["tiny"]


def lowered(config, B: int, capacity: int) -> str:
    def step(arrays, ids, cache):
        return from_arrays(config, arrays)(ids, cache=cache, platform="cuda").logits

    cache = jax.eval_shape(lambda: init_cache(config, B, capacity))
    ids = jax.ShapeDtypeStruct((B, 1), jnp.int32)
    return lower_for_cuda(step, parameter_shapes(config), ids, cache)


@pytest.mark.parametrize(
    ("B", "kernels"),
    [
        (1, ["output_major_gate_up", "output_major_down"]),
        (16, ["gather_rows", "expert_major_gate_up", "expert_major_down"]),
    ],
)
def test_the_blocks_take_the_experts_kernels(B, kernels):
    text = lowered(TINY, B, 32)  # whose heads are too small for the kernels of all layers
    assert kernels_of(text) == kernels  # equal layers share a function
    assert "ragged_dot" not in text


def test_a_long_prefill_takes_the_grouped_products_once_for_equal_layers():
    config = dataclasses.replace(TINY, hidden_size=128, moe_intermediate_size=128)

    def logits(arrays, ids):
        return from_arrays(config, arrays)(ids, logits_to_keep=1, platform="cuda").logits

    ids = jax.ShapeDtypeStruct((1, 513), jnp.int32)
    text = lower_for_cuda(logits, parameter_shapes(config), ids)
    assert config.num_hidden_layers > 1
    assert kernels_of(text) == ["grouped_swiglu", "grouped_matmul"]


def test_a_layer_is_one_kernel():
    config = dataclasses.replace(TINY, head_dim=128, num_hidden_layers=1)
    text = lowered(config, 1, 64)
    assert kernels_of(text) == ["fresh_mailboxes", "decode_layer"]  # the first once a step
    assert "stablehlo.dot_general" in text  # the head
