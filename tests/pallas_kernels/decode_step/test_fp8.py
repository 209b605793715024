"""A layer with FP8 weights: right, the bits of each way to run it, formats of its own a product."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_scaled_fp8 import quantise
from pallas_kernels.decode_step.grids import grids
from pallas_kernels.decode_step.layer import PRODUCTS, default_config, experts_tasks
from pallas_kernels.decode_step.split_product_fp8 import SplitProductFp8
from pallas_kernels.decode_step.tasks import Task, run_as_grid, run_in_python
from pallas_kernels.mosaic.operands import round_up
from tests.pallas_kernels.decode_step.cases import (
    POISONED,
    assert_right,
    assert_same_rows,
    layer_shapes,
    make_case,
    one_row,
    qwen3_shapes,
    run,
)
from tests.pallas_kernels.decode_step.test_lowering import lower
from tests.pallas_kernels.decode_step.test_tasks import arrays_of, layer_tasks, step_of
from tests.pallas_kernels.machine import ON_GPU, kernels_of, mosaic_modules

ALL = tuple(PRODUCTS)
# The output projection's 768 columns are one split and a half.
SIZES = {"heads": 6, "C": 64, "E": 8, "I": 128, "fp8": ALL}
SMALL = layer_shapes(2, **SIZES)
# The interpreter runs few tall blocks sooner than many small ones.
CONFIG = None if ON_GPU else dataclasses.replace(default_config(8, True), gate_up_neurons=64)


@pytest.fixture(scope="module")
def small():
    """A case of two rows with parts, and its step."""
    case = make_case(SMALL, (200, 5), seed=0, num_parts=1)
    return case, run(case, SMALL, config=CONFIG)


def test_matches_reference(small):
    assert_right(small[1], small[0], SMALL)


def test_its_list_in_python_matches_the_reference(small):
    case, _ = small
    grid = layer_tasks(SMALL, 1)
    known = jax.jit(lambda arrays: run_in_python(grid, arrays))(arrays_of(case))
    assert_right(step_of(known, case, SMALL), case, SMALL)


def test_a_row_has_the_same_bits_alone_and_by_counters(small):
    case, step = small
    alone = run(one_row(case, 1), layer_shapes(1, **SIZES), launches="blocks", config=CONFIG)
    assert_same_rows(alone, [0], step, [1])


def product_task(T: int, columns: int) -> Task:
    product = SplitProductFp8(T=T, N=-(-T // 8) * 8, rows=(128, 256), columns=columns, after="")
    reads = ("tokens", "weights_0", "weights_1")
    return Task(
        kind="product",
        work=product,
        reads={name: name for name in reads},
        writes={"partials": "partials"},
    )


@pytest.mark.parametrize(
    ("T", "columns"), [(35, 640), (33, 128), *([(64, 4096), (9, 128)] * ON_GPU)]
)
def test_many_rows_and_a_split_that_the_end_cuts_off(T, columns, seed):
    task, rng = product_task(T, columns), np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-30, 4, (task.work.N, 1))
    tokens = jnp.asarray(rng.normal(size=(task.work.N, columns)) * sizes, jnp.bfloat16)
    arrays = {"tokens": tokens.at[T:].set(jnp.nan)}
    for index, rows in enumerate(task.work.rows):
        weights = jnp.asarray(rng.normal(size=(rows, columns)), jnp.float32)
        arrays[f"weights_{index}"] = jax.jit(quantise)(weights)
    run_product = jax.jit(
        lambda arrays: run_as_grid([task], arrays, ("partials",), name="p", interpret=POISONED)
    )
    found, expected = (
        np.asarray(known["partials"], np.float64)[:, :T]
        for known in (run_product(arrays), run_in_python([task], arrays))
    )
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() < 2e-6


def test_each_product_has_its_own_format():
    """And what each reads is its format's bytes: the values, and a float32 for each block."""
    bytes_of = {"qkv": 5120 * 2048, "o": 4096 * 2048, "gate_up": 8 * 2 * 768 * 2048,
                "down": 8 * 768 * 2048}  # fmt: skip
    of_product = {"qkv": {"qkv"}, "o": {"o"}, "experts": {"gate_up", "down"}}
    for fp8 in ((), ("qkv",), ("o",), ("experts",), ALL):
        scaled = set().union(*(of_product[product] for product in fp8))
        config = default_config(1, "experts" in fp8)
        lists = grids(qwen3_shapes(1, fp8=fp8), config, "layer", 8).values()
        read = {task.kind: task.work.bytes_read for tasks in lists for task in tasks}
        for kind, count in bytes_of.items():
            assert read[kind] == (count + count // 4096 if kind in scaled else 2 * count), kind


def test_lowers_for_cuda():
    text = lower(1, "layer", fp8=ALL)
    assert kernels_of(text) == ["fresh_mailboxes", "decode_layer"]
    module = mosaic_modules(text)[1]
    # Values become f16, and the router's product alone is wgmma's.
    assert "cvt.rn.f16x2.e4m3x2" in module and "atomicrmw" not in module


# --- Qwen3-30B-A3B's sizes

on_gpu = pytest.mark.skipif(not ON_GPU, reason="takes hours in interpret mode")


@on_gpu
@pytest.mark.parametrize("fp8", [ALL, ("qkv",), ("o",), ("experts",)], ids=str)
@pytest.mark.parametrize(
    ("B", "C"), [(1, 512), (2, 4096), (5, 1088), (8, 512), (9, 1024), (33, 512), (64, 4096)]
)
def test_real_sizes(B, C, fp8, seed):
    s = qwen3_shapes(B, C, fp8)
    lengths = np.random.default_rng(seed).integers(0, 2 * C, B)
    valid = np.ones(B, np.int32)
    valid[4::7] = 0
    case = make_case(s, lengths, seed, valid=valid, num_parts=8)
    step = run(case, s)
    assert_right(step, case, s)
    rows = np.flatnonzero(valid)
    assert_same_rows(run(case, s, launches="blocks"), rows, step)
    assert_same_rows(run(case, s), rows, step)
    if B <= 8:
        alone = run(one_row(case, 0), qwen3_shapes(1, C, fp8))
        assert_same_rows(alone, [0], step, [0])


@on_gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"gate_up_block_k": 128, "gate_up_num_stages": 2},
        {"gate_up_neurons": 64},
        {"down_block_m": 64, "down_num_stages": 5},
        {"down_block_k": 256, "down_num_stages": 2},
        {"qkv_spread_ns": 0, "o_spread_ns": 9000},
        {"steps_at_once": 2},
        {"mailboxes": False},
    ],
    ids=str,
)
def test_real_sizes_have_the_same_bits_in_every_config(changes, seed):
    s = qwen3_shapes(4, fp8=ALL)
    case = make_case(s, [500, 0, 1000, 77], seed, num_parts=8)
    expected = run(case, s)
    config = dataclasses.replace(default_config(4, True), **changes)
    for _ in range(100):
        assert_same_rows(run(case, s, config=config), range(4), expected)


@pytest.mark.parametrize("B", [1, 2, 3, 8])
def test_three_blocks_of_the_experts_share_a_core(B):
    """By the rules of Hopper and Mosaic: 228 KB, 1 KB more a block, arrays at multiples of 1 KB."""
    tasks = experts_tasks(qwen3_shapes(B, fp8=ALL), default_config(B, True), mailed=True)
    barriers_of_all_tasks = 256
    for task in tasks:
        (arrays,) = task.work.shared_types()
        sizes = [math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in arrays]
        block = sum(round_up(size, 1024) for size in sizes) + barriers_of_all_tasks
        assert 3 * (block + 1024) <= 228 * 1024, (task.kind, sizes)
