import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from experiments.compare.presets import PRESETS
from pallas_kernels.decode_experts import ExpertMajorConfig, decode_experts, expert_major
from pallas_kernels.decode_experts.batch_tiles import BatchTiles
from pallas_kernels.decode_experts.expert_major import candidate_configs, fitting_grids
from pallas_kernels.decode_experts.grouping import LARGEST_TOKEN_TILE, fitting_token_tile
from tests.pallas_kernels.decode_experts.cases import (
    Size,
    assert_right,
    assert_same_bits,
    make_case,
    struct_case,
)
from tests.pallas_kernels.decode_experts.layout_suite import USUAL, LayoutSuite
from tests.pallas_kernels.decode_experts.lowering_suite import SUM_IN_MEMORY
from tests.pallas_kernels.machine import ON_GPU, kernels_of, lower_for_cuda, mosaic_modules

# In the order of the text: a TMA load, a wgmma group's end, a wait for all but n groups.
_STEPS = re.compile(
    r"(?P<load>cp\.async\.bulk\.tensor\.shared)"
    r"|(?P<commit>wgmma\.commit_group)"
    r"|wgmma\.wait_group\.sync\.aligned (?P<wait>\d+)"
)


PRODUCTS = ["expert_major_gate_up", "expert_major_down"]  # in two launches


class ExpertMajorSuite(LayoutSuite):
    layout = "expert_major"
    small_rings = ExpertMajorConfig(
        gate_up_columns=64, gate_up_slots=2, down_rows=64, down_columns=64, down_slots=2
    )

    def kernels(self, size):
        gathers = BatchTiles.N < size.T
        N = fitting_token_tile(size.T, size.K, size.E)
        one = fitting_grids(N, gathers, size.I) == 1
        return ["gather_rows"] * gathers + (["expert_major"] if one else PRODUCTS)

    def check_kernels(self, modules):
        super().check_kernels(modules)
        for kernel, module in modules.items():
            if kernel != "gather_rows":
                assert_waits_before_refill(module)


class TestExpertMajor(ExpertMajorSuite):
    usual = USUAL if ON_GPU else Size(T=BatchTiles.N + 2, E=4, K=2, H=64, I=64)
    size_of_config = Size(T=BatchTiles.N + 1, E=3, K=2, H=128, I=128)


class TestFewTokens(ExpertMajorSuite):
    """The cases that depend on `usual`, where a batch is a tile as it is."""

    usual = USUAL._replace(T=7 if ON_GPU else 4)

    test_bfloat16_is_float32_rounded_once = None
    test_bits_do_not_depend_on_neighbours = None
    test_bits_do_not_depend_on_the_batch = None
    test_bits_do_not_depend_on_the_place = None
    test_config = None
    test_generated_shape_and_routing = None
    test_gradients_are_a_clear_error = None
    test_jit = None
    test_lowers_for_cuda = None
    test_matches_reference = None
    test_no_races = None
    test_rings_that_come_round_again = None
    test_same_input_same_bits = None
    test_scan_over_layers = None
    test_terms_that_all_but_cancel = None
    test_vmap_over_batches = None


@pytest.mark.parametrize("token_tile", [16, 24, 32, LARGEST_TOKEN_TILE] if ON_GPU else [16])
def test_other_token_tile(token_tile, seed):
    case = make_case(TestExpertMajor.usual, seed)
    out = TestExpertMajor().run(case, config=ExpertMajorConfig(token_tile=token_tile))
    assert_right(out, case)
    if ON_GPU:  # A CPU's matrix product adds in another order if it is wider.
        assert_same_bits(out, TestExpertMajor().run(case))


def test_more_assignments_than_one_launch_gathers(seed, monkeypatch):
    """Then XLA groups and gathers, and no bit changes."""
    size = TestExpertMajor.usual
    case = make_case(size, seed)
    expected = TestExpertMajor().run(case)
    monkeypatch.setattr(expert_major, "MOST_ASSIGNMENTS", size.T * size.K - 1)
    monkeypatch.setattr(expert_major, "gather_rows", None)
    # Traced by this test alone, or the other tests would have to compile anew.
    monkeypatch.setattr(expert_major, "run", expert_major.run.__wrapped__)
    out = jax.jit(TestExpertMajor().run)(case)
    assert_right(out, case)
    assert_same_bits(out, expected)


@pytest.mark.parametrize(("T", "in_one_launch"), [(512, True), (1032, False)])
def test_more_tokens_than_decoding_has(T, in_one_launch, seed):
    """Tiles of 40 and of 64."""
    shapes = PRESETS["qwen3_30b_a3b"]
    size = Size(T=T, E=shapes.E, K=shapes.K, H=shapes.H, I=shapes.I)
    run = functools.partial(decode_experts, layout="expert_major", out_dtype=jnp.float32)
    gathering = ["gather_rows"] if in_one_launch else []
    assert kernels_of(lower_for_cuda(run, *struct_case(size))) == [*gathering, *PRODUCTS]
    if ON_GPU:
        case = make_case(size._replace(H=512), seed)
        assert_right(jax.jit(run)(*case), case)


@pytest.mark.parametrize("grids", [1, 2])
@pytest.mark.parametrize(("I", "apart"), [(768, 1), (128, 0)])
def test_programs_of_a_core_begin_apart_where_more_follow(I, apart, grids):
    """36 tiles of 24 or of 4 programs; a core gets at most two of the latter."""
    size = Size(T=16, E=32, K=4, H=128, I=I)
    config = ExpertMajorConfig(gate_up_columns=128, grids=grids)
    run = functools.partial(decode_experts, layout="expert_major", config=config)
    modules = mosaic_modules(lower_for_cuda(run, *struct_case(size)))
    assert [module.count("%globaltimer") // 2 for module in modules[1:]] == [apart, 0][:grids]


def test_fitting_grids():
    assert fitting_grids(8, gathered=False, I=192) == 1  # the batch as it is
    assert fitting_grids(8, gathered=True, I=768) == 1
    assert fitting_grids(8, gathered=True, I=192) == fitting_grids(16, gathered=True, I=768) == 2


@pytest.mark.parametrize(
    ("T", "I", "grids"), [(8, 768, 0), (64, 768, 2), (64, 192, 1), (128, 768, 0)]
)
def test_the_other_number_of_grids_is_measured_where_it_may_win(T, I, grids):
    shapes = dataclasses.replace(PRESETS["qwen3_30b_a3b"], I=I)
    configs = candidate_configs(shapes, T)
    assert configs[0].grids == 0
    assert {config.grids for config in configs} == {0, grids}


@pytest.mark.parametrize("token_tile", [8, 32])
@pytest.mark.parametrize("T", [2, 20])
def test_one_grid_or_two_launches(T, token_tile, seed):
    """No bit changes; interpret mode runs the same either way."""
    size = Size(T=T, E=6, K=4, H=256, I=128)
    case = make_case(size, seed)
    expected = None
    for grids, products in ((1, ["expert_major"]), (2, PRODUCTS)):
        config = ExpertMajorConfig(token_tile=token_tile, grids=grids)

        def layer(*case, config=config):
            return decode_experts(*case, layout="expert_major", config=config)

        gathering = ["gather_rows"] if T > BatchTiles.N else []
        assert kernels_of(lower_for_cuda(layer, *struct_case(size))) == [*gathering, *products]
        if ON_GPU:
            out = TestExpertMajor().run(case, config=config)
            assert_right(out, case)
            expected = out if expected is None else expected
            assert_same_bits(out, expected)


@pytest.mark.skipif(not ON_GPU, reason="interpret mode takes two launches")
@pytest.mark.parametrize("T", [1, 8, 9, 128])
def test_one_grid_again_and_again(T, seed):
    """Each launch leaves its counters as it found them, also for others with as many tiles."""
    sizes = [Size(T=T, E=128, K=8, H=1024, I=768), Size(T=T, E=128, K=8, H=512, I=256)]
    cases = [make_case(size, seed) for size in sizes]
    one, two = (ExpertMajorConfig(grids=grids) for grids in (1, 2))
    expected = [TestExpertMajor().run(case, config=two) for case in cases]
    run = jax.jit(lambda case: TestExpertMajor().run(case, config=one))
    for _ in range(500):
        for case, out in zip(cases, expected, strict=True):
            assert_same_bits(run(case), out)


@pytest.mark.skipif(not ON_GPU, reason="interpret mode takes two launches")
@pytest.mark.parametrize("T", [1, 8, 20])
def test_calls_that_do_not_depend_on_each_other(T, seed):
    """They share counters, so no two may run at once, whatever order a program leaves open."""
    size = Size(T=T, E=128, K=8, H=512, I=256)
    cases = [make_case(size, seed + index) for index in range(6)]
    one, two = (ExpertMajorConfig(grids=grids) for grids in (1, 2))
    expected = [TestExpertMajor().run(case, config=two) for case in cases]
    together = jax.jit(lambda cases: [TestExpertMajor().run(case, config=one) for case in cases])
    for _ in range(50):
        for out, alone in zip(together(cases), expected, strict=True):
            assert_same_bits(out, alone)


def assert_waits_before_refill(module: str) -> None:
    """Interpret mode runs wgmma synchronously, so a refill too early shows only in the code.

    The first wgmma starts the ring's loop; from there, loads come only after a wait that leaves at
    most the last step's groups running.
    """
    assert "wgmma.mma_async" in module
    loop = module[module.index("wgmma.mma_async") :]
    groups, waited = 0, False
    for step in _STEPS.finditer(loop):
        if step["commit"]:
            groups += 1
            waited = False
        elif step["wait"] is not None:
            waited = int(step["wait"]) <= groups
        else:
            assert waited, "a slot is refilled while a wgmma may still read it"
    assert groups > 0 and "cp.async.bulk.tensor.shared" in loop


@pytest.mark.parametrize(
    ("assembly", "caught"),
    [
        ("red.global.add.f32 [at], x;", True),
        ("atom.add.relaxed.gpu.global.noftz.bf16x2 y, [at], x;", True),
        ("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add", True),
        ("red.add.release.gpu.global.u32 [at], 1;", False),
    ],
)
def test_a_sum_in_memory_is_caught(assembly, caught):
    assert bool(SUM_IN_MEMORY.search(assembly)) == caught


def test_a_refill_without_the_wait_is_caught():
    step = "wgmma.mma_async wgmma.commit_group.sync.aligned; {} cp.async.bulk.tensor.shared"
    assert_waits_before_refill(step.format("wgmma.wait_group.sync.aligned 1;"))
    for wait in ("", "wgmma.wait_group.sync.aligned 2;"):
        with pytest.raises(AssertionError, match="refilled"):
            assert_waits_before_refill(step.format(wait))
