"""Kernels are told apart by scope, by their own names, and by kind."""

import dataclasses
import functools

import jax
import pytest

from experiments.bench.kernel_profile import (
    DECODE_STEP,
    TRAIN_STEP,
    Kernel,
    Profile,
    profile_kernels,
)
from moe_jax.training import OptimizerOptions, init_state, train_step
from tests.moe_jax.training import test_train_step


def test_kernels_are_added_up_by_class():
    hlo = """
  %fusion.1 = f32[] fusion(%a), metadata={op_name="jit(p)/while/body/layer_0/moe/experts/mul"}
  ROOT gemm.2 = f32[] custom-call(%b), metadata={op_name="jit(p)/while/body/layer_0/moe/router/dot"}
  %copy.3 = f32[] copy(%a)
"""
    kernels = [
        Kernel("fusion_1", "fusion.1", 10.0),
        Kernel("fusion_1", "fusion.1", 14.0),
        Kernel("nvjet_128", "gemm.2", 4.0),
        Kernel("copy_3", "copy.3", 1.0),
    ]
    profile = Profile(kernels, hlo, DECODE_STEP, steps=2)
    assert profile.record() == {"experts": [1.0, 12.0], "router": [0.5, 2.0], "rest": [0.5, 0.5]}
    assert list(profile.by_kernel()) == ["experts: fusion", "router: gemm: nvjet", "rest: copy"]
    assert profile.kernel_lines(2) == [
        "       12.0 us in    1.00 launches a step: experts: fusion",
        "        2.0 us in    0.50 launches a step: router: gemm: nvjet",
        "  and 1 more kernels",
    ]


def test_kernels_of_a_cuda_graph_are_told_by_their_own_names():
    hlo = '%fusion.1 = f32[] fusion(%a), metadata={op_name="jit(p)/lm_head/mul"}'
    kernels = [
        Kernel("fusion_1", "command_buffer", 10.0),
        Kernel("decode_layer_mosaic_gpu_kernel", "command_buffer", 7.0),
        Kernel("memcpy32_post", "command_buffer", 1.0),
    ]
    totals = Profile(kernels, hlo, DECODE_STEP, steps=1).by_class()
    assert {name: total.us for name, total in totals.items()} == {
        "head": 10.0,
        "layer": 7.0,
        "rest": 1.0,
    }


def test_a_training_steps_products_are_apart_from_what_is_around_them():
    lines = {
        "custom-call.1": "jvp(layer_0)/attention/dot_product_attention_fwd",
        "custom-call.2": "transpose(jvp(layer_0))/attention/...i,oi->...o/dot_general",
        "fusion.3": "transpose(jvp(layer_0))/attention/mul",
        "custom-call.4": "transpose(jvp(layer_0))/moe/experts/pallas_call",
        "fusion.5": "jvp(layer_0)/moe/experts/sort",
        "custom-call.6": "transpose(jvp(cross_entropy))/while/body/checkpoint/dot_general",
        "fusion.11": "jvp(layer_11)/add",
        "fusion.7": "transpose(jvp(cast))/convert_element_type",
        "fusion.8": "update/mul",
        "fusion.9": "reduce_sum",
        "copy.10": "state.params['layers.0.mlp.experts.down']",
    }
    hlo = "\n".join(
        f'  %{name} = f32[] fusion(%a), metadata={{op_name="jit(train_step)/{scopes}"}}'
        for name, scopes in lines.items()
    )
    names = {
        "custom-call.1": "cudnn_generated_fort_native_sdpa_sm90_flash_fprop",
        "custom-call.2": "nvjet_tst_128x256",
        "custom-call.4": "grouped_matmul_to_weights_mosaic_gpu_kernel",
        "custom-call.6": "sm90_xmma_gemm_bf16f32",
    }
    kernels = [Kernel(names.get(name, name.replace(".", "_")), name, 1.0) for name in lines]
    kernels += [
        Kernel("grouped_swiglu_mosaic_gpu_kernel", "command_buffer", 1.0),
        Kernel("nvjet_tst_64x8", "command_buffer", 1.0),
        Kernel("ncclDevKernel_AllReduce", "all-reduce.1", 1.0),
    ]
    found = Profile(kernels, hlo, TRAIN_STEP, steps=1).record()
    one = [1.0, 1.0]
    assert found == {
        "attention cudnn": one,
        "attention products": one,
        "attention": one,
        "experts products": [2.0, 2.0],
        "experts": one,
        "head products": one,
        "norms and sums": one,
        "cast": one,
        "optimiser": one,
        "rest": [2.0, 2.0],
        "rest products": one,
        "rest collectives": one,
    }


def test_the_scopes_are_those_of_a_training_step():
    """A scope that was renamed in the model would leave its class empty."""
    options = dataclasses.replace(test_train_step.OPTIONS, compute_dtype="bfloat16")
    shapes = jax.eval_shape(
        functools.partial(init_state, optimizer=OptimizerOptions()),
        test_train_step.random_arrays(test_train_step.CONFIG),
    )
    step = jax.jit(train_step, static_argnames="options")
    lowered = step.lower(shapes, test_train_step.make_batch(1), options=options)
    found = TRAIN_STEP.of_instructions(lowered.as_text("hlo", debug_info=True))
    assert {*found.values()} == {*TRAIN_STEP.scopes.values(), "rest"} - {"dense mlp"}


def test_without_a_gpu_there_is_no_profile():
    with pytest.raises(RuntimeError, match="the profile has no GPU kernel; the platform is cpu"):
        profile_kernels(lambda: None)
