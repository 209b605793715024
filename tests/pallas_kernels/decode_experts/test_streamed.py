import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from experiments.compare.presets import PRESETS
from pallas_kernels.decode_experts import (
    LAYOUTS,
    StreamedConfig,
    decode_experts,
    expert_major,
    group,
    streamed,
)
from pallas_kernels.decode_experts.tiles import Tiles, Unit, pad_ids
from pallas_kernels.mosaic import interpret_params
from tests.pallas_kernels.decode_experts.cases import (
    Size,
    assert_right,
    assert_same_bits,
    make_case,
)
from tests.pallas_kernels.decode_experts.layout_suite import USUAL, LayoutSuite
from tests.pallas_kernels.decode_experts.test_expert_major import assert_waits_before_refill
from tests.pallas_kernels.machine import INTERPRET, ON_GPU


class StreamedSuite(LayoutSuite):
    layout = "streamed"
    most_copies_of_ids = 4  # 1024 ids at T = 128, at most 256 a copy
    small_rings = StreamedConfig(columns=64, slots=3)

    def kernels(self, size, grouping):
        return ["streamed"]

    def check_kernels(self, modules):
        super().check_kernels(modules)
        for module in modules.values():
            assert_waits_before_refill(module)


class TestStreamed(StreamedSuite):
    if not ON_GPU:
        # Interpreted, a shape is three kernels and takes some five seconds to compile. What the
        # layout has in common with others is left to the slow ones.
        test_bfloat16_is_float32_rounded_once = None
        test_bits_do_not_depend_on_the_batch = None
        test_bits_do_not_depend_on_the_place = None
        test_every_element_is_written = None
        test_generated_shape_and_routing = None
        test_jit = None
        test_other_token_tile = None
        test_own_grouping_passed_in_changes_no_bit = None
        test_same_input_same_bits = None
        test_scan_over_layers = None
        test_terms_that_all_but_cancel = None
        test_unused_expert_changes_no_bit = None
        test_vmap_over_batches = None


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="TestStreamed has them all there")
class TestStreamedAtLength(StreamedSuite):
    pass


@pytest.mark.parametrize(
    ("T", "others"),
    [
        (64, [(256, 4), (128, 8), (128, 10)]),
        (128, [(128, 8)]),  # 6 slots and 4 of 256 columns are both cut to 4
        (1000, [(128, 8)]),
    ],
)
def test_candidates_have_no_more_slots_than_fit(T, others):
    shapes = PRESETS["qwen3_30b_a3b"]
    configs = streamed.candidate_configs(shapes, T)
    others = [StreamedConfig(columns=columns, slots=slots) for columns, slots in others]
    assert configs == [streamed.default_config(shapes, T), *others]


def test_more_tokens_than_one_kernel_takes(seed, monkeypatch):
    monkeypatch.setattr(streamed, "MOST_TOKENS", 3 if ON_GPU else 2)
    # Traced by this test alone, or the other tests would have to compile anew.
    monkeypatch.setattr(streamed, "run", streamed.run.__wrapped__)
    case = make_case(Size(T=7 if ON_GPU else 3, E=4, K=2, H=64, I=64), seed)
    assert_right(jax.jit(TestStreamed().run)(case), case)


def test_routed_outputs_are_what_run_combines(seed):
    case = make_case(USUAL, seed)
    config = streamed.default_config(USUAL.shapes, USUAL.T)
    run = functools.partial(streamed.routed_outputs, config=config, interpret=INTERPRET)
    outputs, row_of = jax.jit(run)(*case)
    chex.assert_shape(row_of, (USUAL.T, USUAL.K))
    assert_same_bits(expert_major.combine(outputs, row_of), TestStreamed().run(case))


@pytest.mark.parametrize("value", [jnp.inf, jnp.nan])
def test_an_expert_changes_no_token_that_is_not_routed_there(value, seed):
    size = Size(T=48 if ON_GPU else 4, E=4, K=1, H=128, I=128)
    case = make_case(size, seed)
    case = case._replace(expert_ids=(jnp.arange(size.T, dtype=jnp.int32) % 4)[:, None])
    weights = jax.tree.map(lambda w: w.at[2].set(value), case.weights)
    others = np.arange(size.T) % 4 != 2
    layout = TestStreamed()
    out = layout.run(case._replace(weights=weights))
    assert_same_bits(out[others], layout.run(case)[others])


@pytest.mark.skipif(not ON_GPU, reason="a CPU's matrix product of another width adds differently")
@pytest.mark.parametrize("T", [1, 7, 8, 64, 128])
def test_same_bits_as_expert_major_whatever_the_configs(T, seed):
    size = Size(T=T, E=128, K=8, H=2048, I=768)
    case = make_case(size, seed)
    expected = TestStreamed().run(case)
    assert_right(expected, case)
    for layout in ("streamed", "expert_major"):
        for config in LAYOUTS[layout].candidate_configs(size.shapes, T):
            out = decode_experts(*case, layout=layout, config=config, out_dtype=jnp.float32)
            assert_same_bits(out, expected)


def test_calls_that_do_not_depend_on_each_other(seed):
    """Grids that fill the GPU must not be on it at once, whatever order a program leaves open."""
    count = 6 if ON_GPU else 2
    cases = [make_case(USUAL, seed + index) for index in range(count)]
    layout = TestStreamed()
    expected = [layout.run(case) for case in cases]
    together = jax.jit(lambda cases: [layout.run(case) for case in cases])
    for _ in range(50 if ON_GPU else 1):
        for out, alone in zip(together(cases), expected, strict=True):
            assert_same_bits(out, alone)


def _find(tiles: Tiles, ids: jax.Array, blocks: int) -> tuple[jax.Array, jax.Array]:
    """What every program finds: the number of tiles, and the fields of each unit."""

    def kernel(ids_gmem, count_gmem, units_gmem, **scratch):
        count_gmem[0] = tiles.find(ids_gmem, scratch, INTERPRET)
        tiles.find_experts(scratch)

        def body(index, _):
            for field, value in enumerate(tiles.unit(scratch, index, blocks)):
                units_gmem[index, field] = value

        jax.lax.fori_loop(0, count_gmem[0] * blocks, body, None)

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct((tiles.most * blocks, len(Unit._fields)), jnp.int32),
        ),
        grid=(1,),
        grid_names=("program",),
        scratch_types=tiles.scratch_types(),
        interpret=interpret_params(INTERPRET),
    )(ids)


@pytest.mark.parametrize("T, K, E, N", [(1, 2, 3, 8), (20, 2, 5, 8), (40, 3, 130, 16)])
def test_tiles_are_those_of_a_grouping(T, K, E, N, seed):
    rng = np.random.default_rng(seed)
    # A popular expert with several tiles; padding on both sides.
    ids = np.where(rng.random((T, K)) < 0.5, 1, rng.integers(-1, E + 2, (T, K))).astype(np.int32)
    blocks = 3
    find = functools.partial(_find, Tiles(T=T, K=K, E=E, N=N), blocks=blocks)
    [count], units = jax.device_get(find(pad_ids(jnp.asarray(ids))))

    grouping = group(jnp.asarray(ids), jnp.ones((T, K)), E, token_tile=N)
    experts_of_rows = np.asarray(grouping.expert_of).reshape(-1, N)
    owned = (experts_of_rows >= 0).sum(axis=1)
    experts = experts_of_rows[owned > 0, 0]
    assert count == len(experts)
    expected = [
        (expert, tile, block, owned[tile])
        for expert in np.unique(experts)
        for block in range(blocks)
        for tile in np.flatnonzero(experts == expert)
    ]
    np.testing.assert_array_equal(units[: count * blocks], np.reshape(expected, (-1, 4)))
