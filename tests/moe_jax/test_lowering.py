"""A decode step in the kernels lowers for CUDA, on a machine without a GPU."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from moe_jax.cache import init_cache
from moe_jax.parallelism import Parallelism
from moe_jax.parameters import from_arrays, parameter_shapes
from moe_jax.presets import PRESETS
from moe_jax.sharding import MESH_AXES
from moe_jax.training import Batch, TrainOptions, gradients_of
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


def test_a_layer_is_one_kernel_and_all_layers_are_alike():
    config = dataclasses.replace(TINY, head_dim=128)
    text = lowered(config, 1, 64)
    assert config.num_hidden_layers > 1
    # The first one once a step; the layer's is lowered once, and called for each of them.
    assert kernels_of(text) == ["fresh_mailboxes", "decode_layer"]
    assert len(re.findall(r"call @launch_layer\(", text)) == config.num_hidden_layers
    assert "stablehlo.dot_general" in text  # the head


def on_hoppers(**sizes) -> Parallelism:
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    shape = tuple(sizes.get(name, 1) for name in MESH_AXES)
    mesh = AbstractMesh(shape, MESH_AXES, abstract_device=device)
    return Parallelism(mesh=mesh, fsdp=False)


def shapes_on(parallelism, config, dtype) -> dict[str, jax.ShapeDtypeStruct]:
    rule = parallelism.rule(config)
    return {
        name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rule(name, s.shape))
        for name, s in parameter_shapes(config, dtype).items()
    }


def lowered_on(parallelism, function, *arguments) -> str:
    with use_abstract_mesh(parallelism.mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


EXPERT_MAJOR = ["gather_rows", "expert_major_gate_up", "expert_major_down"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "B", "kernels", "sums"),
    [
        ({"expert": 2}, 1, ["fresh_mailboxes", "decode_layer"], 1),
        ({"expert": 2}, 16, ["decode_attention", *EXPERT_MAJOR], 1),
        ({"tensor": 2}, 16, ["decode_heads", "decode_router", *EXPERT_MAJOR], 2),
    ],
)
def test_a_mesh_has_few_kernels_and_one_or_two_sums_a_layer(sizes, B, kernels, sums):
    config = dataclasses.replace(TINY, head_dim=128, num_hidden_layers=1, moe_intermediate_size=128)
    parallelism = on_hoppers(**sizes)

    def step(arrays, x, cache):
        model = from_arrays(config, arrays)
        how = {"platform": "cuda", "parallelism": parallelism}
        return model(inputs_embeds=x, cache=cache, **how).logits

    cache = jax.eval_shape(lambda: init_cache(config, B, 64))
    x = jax.ShapeDtypeStruct((B, 1, config.hidden_size), jnp.bfloat16)
    text = lowered_on(parallelism, step, shapes_on(parallelism, config, jnp.bfloat16), x, cache)
    assert kernels_of(text) == kernels
    assert text.count("stablehlo.all_reduce") == sums


def test_training_on_cuda_sends_what_is_needed_and_no_more():
    """There and back, forward and backward: XLA has no such operation for CPUs."""
    parallelism = on_hoppers(expert=2)
    config = dataclasses.replace(TINY, num_hidden_layers=1)
    options = TrainOptions(config=config, platform="cuda", parallelism=parallelism)
    batch = Batch(**dict.fromkeys(
        ("input_ids", "labels", "segment_ids"), jax.ShapeDtypeStruct((1, 2, 4), jnp.int32)
    ))  # fmt: skip
    gradients = functools.partial(gradients_of, options=options)
    text = lowered_on(parallelism, gradients, shapes_on(parallelism, config, jnp.float32), batch)
    assert text.count("@ragged_all_to_all") == 4
