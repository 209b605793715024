import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.decode_experts import (
    LAYOUTS,
    ExpertMajorConfig,
    decode_experts,
    expert_major,
)
from pallas_kernels.decode_experts.expert_major_config import default_fused
from pallas_kernels.decode_experts.expert_schedule import MAX_BLOCK_N, default_block_n
from pallas_kernels.decode_experts.shapes import SHAPES
from pallas_kernels.decode_experts.token_tiles import WholeBatchTiles
from tests.pallas_kernels.decode_experts.cases import (
    Size,
    assert_right,
    assert_same_bits,
    make_case,
    struct_case,
)
from tests.pallas_kernels.decode_experts.layout_suite import USUAL, LayoutSuite, RoutingSuite
from tests.pallas_kernels.decode_experts.lowering_suite import SUM_IN_MEMORY, LoweringSuite
from tests.pallas_kernels.machine import (
    ON_GPU,
    kernels_of,
    lower_for_cuda,
    mosaic_modules,
)

# In the order of the text: a TMA load, a wgmma group's end, a wait for all but n groups.
_STEPS = re.compile(
    r"(?P<load>cp\.async\.bulk\.tensor\.shared)"
    r"|(?P<commit>wgmma\.commit_group)"
    r"|wgmma\.wait_group\.sync\.aligned (?P<wait>\d+)"
)


PRODUCTS = ["expert_major_gate_up", "expert_major_down"]  # in two launches


class TestGathered(LayoutSuite, LoweringSuite):
    """More than 8 tokens: gathered tiles, and both products in one fused grid."""

    layout = "expert_major"
    usual = USUAL if ON_GPU else Size(T=WholeBatchTiles.N + 2, E=4, K=2, H=64, I=64)
    size_of_config = Size(T=WholeBatchTiles.N + 1, E=3, K=2, H=128, I=128)
    small_rings = ExpertMajorConfig(
        gate_up_block_k=64,
        gate_up_num_stages=2,
        down_block_m=64,
        down_block_k=64,
        down_num_stages=2,
        fused=True,
    )
    race_config = dataclasses.replace(small_rings, fused=False)

    def config(self, size):
        # What layers of the usual I take, of which an interpreted one is too small.
        default = LAYOUTS[self.layout].default_config(size.shapes, size.T)
        return dataclasses.replace(default, fused=True)

    def kernels(self, size):
        gathers = WholeBatchTiles.N < size.T
        N = default_block_n(size.T, size.K, size.E)
        fused = default_fused(N, gathers, size.I)
        return ["gather_rows"] * gathers + (["expert_major"] if fused else PRODUCTS)

    def check_kernels(self, modules):
        super().check_kernels(modules)
        for kernel, module in modules.items():
            if kernel != "gather_rows":
                assert_waits_before_refill(module)


class TestWholeBatch(RoutingSuite):
    """Up to 8 tokens, where a batch is a tile as it is."""

    layout = "expert_major"
    usual = USUAL._replace(T=7 if ON_GPU else 4)


@pytest.mark.parametrize("block_n", [16, 24, 32, MAX_BLOCK_N] if ON_GPU else [16])
@pytest.mark.parametrize("neurons", [16, 32, 64] if ON_GPU else [16, 64])
def test_other_blocks(block_n, neurons, seed):
    case = make_case(TestGathered.usual, seed)
    changes = {"block_n": block_n, "gate_up_neurons": neurons}
    if ON_GPU:
        changes["down_block_m"] = 4 * neurons  # each that it takes
    config = dataclasses.replace(TestGathered.small_rings, **changes)
    out = TestGathered().run(case, config=config)
    assert_right(out, case)
    if ON_GPU:  # A CPU's matrix product adds in another order if it is wider.
        assert_same_bits(out, TestGathered().run(case))


def test_more_assignments_than_one_launch_gathers(seed, monkeypatch):
    """Then XLA groups and gathers, and no bit changes."""
    size = TestGathered.usual
    case = make_case(size, seed)
    expected = TestGathered().run(case)
    monkeypatch.setattr(expert_major, "MAX_ASSIGNMENTS", size.T * size.K - 1)
    monkeypatch.setattr(expert_major, "gather_by_kernel", None)
    # Traced by this test alone, or the other tests would have to compile anew.
    layout = LAYOUTS["expert_major"]
    traced_here = dataclasses.replace(layout, run=layout.run.__wrapped__)
    monkeypatch.setitem(LAYOUTS, "expert_major", traced_here)
    out = jax.jit(TestGathered().run)(case)
    assert_right(out, case)
    assert_same_bits(out, expected)


@pytest.mark.parametrize(("T", "in_one_launch"), [(512, True), (1032, False)])
def test_more_tokens_than_decoding_has(T, in_one_launch, seed):
    """Tiles of 40 and of 64."""
    shapes = SHAPES["qwen3_30b_a3b"]
    size = Size(T=T, E=shapes.E, K=shapes.K, H=shapes.H, I=shapes.I)
    run = functools.partial(decode_experts, layout="expert_major", out_dtype=jnp.float32)
    gathering = ["gather_rows"] if in_one_launch else []
    assert kernels_of(lower_for_cuda(run, *struct_case(size))) == [*gathering, *PRODUCTS]
    if ON_GPU:
        case = make_case(size._replace(H=512), seed)
        assert_right(jax.jit(run)(*case), case)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("I", "staggered"), [(768, 1), (128, 0)])
def test_a_staggered_start_where_more_blocks_follow(I, staggered, fused):
    """36 tiles of 24 or of 4 blocks; a core gets at most two of the latter."""
    size = Size(T=16, E=32, K=4, H=128, I=I)
    config = ExpertMajorConfig(gate_up_block_k=128, fused=fused)
    run = functools.partial(decode_experts, layout="expert_major", config=config)
    modules = mosaic_modules(lower_for_cuda(run, *struct_case(size)))
    found = [module.count("nanosleep") for module in modules[1:]]
    assert found == ([staggered] if fused else [staggered, 0])


def test_default_fused():
    assert default_fused(8, gathered=False, I=192)  # the batch as it is
    assert default_fused(8, gathered=True, I=768)
    assert not default_fused(8, gathered=True, I=192)
    assert not default_fused(16, gathered=True, I=768)


@pytest.mark.parametrize(
    ("T", "I", "fused"), [(8, 768, None), (64, 768, False), (64, 192, True), (128, 768, None)]
)
def test_the_other_number_of_launches_is_measured_where_it_may_win(T, I, fused):
    shapes = dataclasses.replace(SHAPES["qwen3_30b_a3b"], I=I)
    configs = LAYOUTS["expert_major"].candidates(shapes, T)
    assert configs[0].fused is None
    usual = [config for config in configs if config.gate_up_neurons == configs[0].gate_up_neurons]
    assert {config.fused for config in usual} == {None, fused}


FUSED, APART = ExpertMajorConfig(fused=True), ExpertMajorConfig(fused=False)


@pytest.mark.parametrize(
    ("T", "block_n"), [(2, 8), (9, 8), pytest.param(9, 32, marks=pytest.mark.slow)]
)
def test_one_fused_grid_has_the_bits_of_two_launches(T, block_n, seed):
    if ON_GPU:
        size = Size(T=2 * T, E=6, K=4, H=256, I=128)
    else:
        size = Size(T=T, E=3, K=2, H=64, I=64)
    case = make_case(size, seed)
    outputs = []
    for fused, products in ((True, ["expert_major"]), (False, PRODUCTS)):
        config = dataclasses.replace(TestGathered.small_rings, block_n=block_n, fused=fused)

        def layer(*case, config=config):
            return decode_experts(*case, layout="expert_major", config=config)

        gathering = ["gather_rows"] if size.T > WholeBatchTiles.N else []
        assert kernels_of(lower_for_cuda(layer, *struct_case(size))) == [*gathering, *products]
        outputs.append(TestGathered().run(case, config=config))
    assert_right(outputs[0], case)
    assert_same_bits(*outputs)


@pytest.mark.skipif(not ON_GPU, reason="an interpreted launch gets fresh counters")
@pytest.mark.parametrize("T", [1, 8, 9, 128])
def test_a_fused_grid_again_and_again(T, seed):
    """Each launch leaves its counters as it found them, also for others with as many tiles."""
    sizes = [Size(T=T, E=128, K=8, H=1024, I=768), Size(T=T, E=128, K=8, H=512, I=256)]
    cases = [make_case(size, seed) for size in sizes]
    expected = [TestGathered().run(case, config=APART) for case in cases]
    run = jax.jit(lambda case: TestGathered().run(case, config=FUSED))
    for _ in range(500):
        for case, out in zip(cases, expected, strict=True):
            assert_same_bits(run(case), out)


@pytest.mark.skipif(not ON_GPU, reason="interpreted kernels follow one another")
@pytest.mark.parametrize("T", [1, 8, 20])
def test_calls_that_do_not_depend_on_each_other(T, seed):
    """They share counters, so no two may run at once, whatever order a program leaves open."""
    size = Size(T=T, E=128, K=8, H=512, I=256)
    cases = [make_case(size, seed + index) for index in range(6)]
    expected = [TestGathered().run(case, config=APART) for case in cases]
    together = jax.jit(lambda cases: [TestGathered().run(case, config=FUSED) for case in cases])
    for _ in range(50):
        for out, alone in zip(together(cases), expected, strict=True):
            assert_same_bits(out, alone)


def assert_waits_before_refill(module: str) -> None:
    """Interpret mode runs wgmma synchronously, so a refill too early shows only in the code.

    The first wgmma starts the mainloop; from there, loads come only after a wait that leaves at
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
            assert waited, "a stage is refilled while a wgmma may still read it"
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
