"""Each layout with FP8 weights: right, the same bits in any batch, errors, the lowered code."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_scaled_fp8 import scales_shape
from pallas_kernels.decode_experts import LAYOUTS, ExpertWeights, decode_experts
from pallas_kernels.decode_experts.shapes import SHAPES, shapes_of
from tests.pallas_kernels.decode_experts.cases import (
    Case,
    Size,
    assert_right,
    assert_same_bits,
    case_specs,
    draw_case,
)
from tests.pallas_kernels.decode_experts.lowering_suite import SUM_IN_MEMORY
from tests.pallas_kernels.machine import INTERPRET, ON_GPU, lower_for_cuda, mosaic_modules
from tests.pallas_kernels.races import run_and_assert_no_races

# More tokens than a tile holds; interpreted, stages that come round again.
SIZE = Size(T=128, E=16, K=4, H=1024, I=768) if ON_GPU else Size(T=9, E=3, K=2, H=384, I=128)
# The interpreter runs few tall blocks sooner than many small ones.
_NARROW = {
    "gate_up_block_k": 128,
    "gate_up_num_stages": 2,
    "down_block_k": 128,
    "down_num_stages": 2,
}
INTERPRETED = {
    "output_major": _NARROW | {"gate_up_block_m": 64, "down_block_m": 64},
    "expert_major": _NARROW | {"gate_up_neurons": 64, "fused": True},
}


def in_fp8(size: Size):
    return dataclasses.replace(size.shapes, weights="fp8")


def make_case(size: Size, seed: int) -> Case:
    return draw_case(in_fp8(size), size.T, seed)


def config_of(layout: str, size: Size, **fields):
    default = LAYOUTS[layout].default_config(in_fp8(size), size.T)
    return dataclasses.replace(default, **({} if ON_GPU else INTERPRETED[layout]) | fields)


def run(case: Case, layout: str, **keywords) -> jax.Array:
    (T, K), (E, H, I) = case.expert_ids.shape, case.weights.down.shape
    config = config_of(layout, Size(T=T, E=E, K=K, H=H, I=I))
    keywords = {"interpret": INTERPRET, "out_dtype": jnp.float32, "config": config} | keywords
    return decode_experts(*case, layout=layout, **keywords)


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def case(layout):
    """Tokens of all sizes from 1e-30 to 1e4, one of them padding, another with a padded expert."""
    # Only expert_major has tiles to fill, and the interpreter takes its time for output_major.
    size = SIZE if ON_GPU or layout == "expert_major" else SIZE._replace(T=4)
    case = make_case(size, 0)
    sizes = 10.0 ** jnp.linspace(-30, 4, size.T)[:, None]
    ids = case.expert_ids.at[1].set(-1).at[2, 0].set(size.E)
    x = (case.x * sizes).astype(jnp.bfloat16).at[1].set(jnp.nan)
    return case._replace(x=x, expert_ids=ids)


@pytest.fixture(scope="module")
def expected(case, layout):
    return run(case, layout)


def test_matches_reference(case, expected):
    clean = case._replace(x=jnp.where(jnp.isnan(case.x), 0, case.x))
    assert_right(expected, clean)
    np.testing.assert_array_equal(expected[1], 0)


def test_bits_do_not_depend_on_the_batch_and_no_races(case, expected, layout):
    """Eight tokens are one tile of expert_major as they are; more are gathered."""
    which = np.random.default_rng(0).permutation(len(case.x))[: 64 if ON_GPU else 2]
    some = case.tokens(which)
    if ON_GPU:
        assert_same_bits(run(some, layout), expected[which])
        return
    # The race detector does not see the counters that order one grid's blocks.
    apart = {"fused": False} if layout == "expert_major" else {}
    config = config_of(layout, SIZE, **apart)
    out = run_and_assert_no_races(
        lambda *case, interpret: run(Case(*case), layout, interpret=interpret, config=config), *some
    )
    assert_same_bits(out, expected[which])


@pytest.mark.skipif(not ON_GPU, reason="slow interpreted, and the last line is every layout's")
def test_bfloat16_is_float32_rounded_once(case, expected, layout):
    out = run(case, layout, out_dtype=None)
    assert_same_bits(out, expected.astype(jnp.bfloat16))


@pytest.mark.skipif(not ON_GPU, reason="slow interpreted, where all configs run the same sums")
@pytest.mark.parametrize("T", [1, 8, 64, 128])
def test_same_bits_whatever_the_config(T, layout, seed):
    size = Size(T=T, E=128, K=8, H=2048, I=768)
    case = make_case(size, seed)
    expected = run(case, layout)
    assert_right(expected, case)
    for config in LAYOUTS[layout].candidates(in_fp8(size), T):
        for _ in range(20):
            assert_same_bits(run(case, layout, config=config), expected)


def test_lowers_for_cuda(layout):
    shapes = shapes_of("qwen3_30b_a3b", "fp8")
    call = functools.partial(decode_experts, layout=layout)
    modules = mosaic_modules(lower_for_cuda(call, *case_specs(shapes, 8)))
    assert len(modules) == {"output_major": 2, "expert_major": 1}[layout]
    for module in modules:
        assert "cvt.rn.f16x2.e4m3x2" in module
        assert not SUM_IN_MEMORY.search(module)
        loads, hints = map(module.count, ("cp.async.bulk.tensor.shared", "L2::evict_first"))
        assert loads == hints > 0
    assert ("mma.sync.aligned.m16n8k16" in modules[0]) == (layout == "expert_major")
    # A lane waits for its loads before the barrier behind which a stage of either product is
    # refilled. Without that, one of many calls on a GPU had wrong bits; no simulator shows it.
    assert modules[0].count("bar.red.or.pred") == {"output_major": 0, "expert_major": 2}[layout]


def _changed(weights: ExpertWeights, name: str, **fields) -> ExpertWeights:
    weight = dataclasses.replace(getattr(weights, name), **fields)
    return dataclasses.replace(weights, **{name: weight})


def zeros_like(spec, dtype):
    return jnp.zeros(spec.shape, dtype)


_, E, _, H, I = SIZE
_ONES = functools.partial(jnp.ones, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda w: _changed(w, "down", scales=_ONES((E, 2, 3))),
            ValueError,
            f"weights.down.scales has shape ({E}, 2, 3); expected {scales_shape((E, H, I))}",
        ),
        (
            lambda w: _changed(w, "gate_up", scales=zeros_like(w.gate_up.scales, jnp.bfloat16)),
            TypeError,
            "weights.gate_up.scales has dtype bfloat16; expected float32",
        ),
        (
            lambda w: _changed(w, "down", values=jnp.ones((E, H, I), jnp.float8_e5m2)),
            TypeError,
            "weights.down.values has dtype float8_e5m2; expected float8_e4m3fn",
        ),
        (
            lambda w: dataclasses.replace(w, down=jnp.ones((E, H, I), jnp.bfloat16)),
            TypeError,
            "weights.down is bfloat16; expected BlockScaledFp8, as the other weight is",
        ),
        (
            lambda w: _changed(w, "down", scales=_ONES((E, H // 64, I // 64)), block=(64, 64)),
            NotImplementedError,
            "weights.down has blocks of (64, 64); the kernels take (128, 128)",
        ),
    ],
)
def test_wrong_weights(change, error, message):
    case = case_specs(in_fp8(SIZE), 1)
    with pytest.raises(error, match=re.escape(message)):
        decode_experts(*case._replace(weights=change(case.weights)), interpret=True)


def test_sizes_of_cut_off_blocks_are_not_taken(layout):
    size = Size(T=1, E=1, K=1, H=192, I=128)
    case = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), case_specs(in_fp8(size), 1))
    with pytest.raises(NotImplementedError, match=re.escape("H is 192; with FP8 weights")):
        decode_experts(*case, layout=layout, interpret=True)


@pytest.mark.parametrize(
    ("layout", "field", "value"),
    [
        ("output_major", "down_block_k", 64),
        ("expert_major", "gate_up_neurons", 16),
        ("expert_major", "gate_up_block_k", 64),
        ("expert_major", "block_n", 64),
    ],
)
def test_configs_of_bf16_that_fp8_does_not_take(layout, field, value):
    checked, shapes = LAYOUTS[layout], SHAPES["qwen3_30b_a3b"]
    config = dataclasses.replace(checked.default_config(shapes, 8), **{field: value})
    checked.check(config, shapes)
    with pytest.raises(ValueError, match=rf"config.{field} is {value}; expected"):
        checked.check(config, dataclasses.replace(shapes, weights="fp8"))
