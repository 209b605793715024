"""Both phases of decode attention against the plain twin, and what must hold for their bits."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.chunk_ring import splits_of
from pallas_kernels.decode_attention.merge_splits import MergeSplits
from pallas_kernels.decode_attention.split_attention import SplitAttention
from pallas_kernels.mosaic.device import launch
from tests.pallas_kernels.decode_attention.attend import attend
from tests.pallas_kernels.decode_attention.cases import Size, assert_right, make_case, one_row
from tests.pallas_kernels.decode_experts.cases import assert_same_bits
from tests.pallas_kernels.machine import (
    INTERPRET,
    ON_GPU,
    examples,
    lower_for_cuda,
    mosaic_modules,
)
from tests.pallas_kernels.races import run_and_assert_no_races

# All that no block has written is NaN, so that an element that stays unwritten shows.
POISONED = plgpu.InterpretGPUParams(uninitialized_memory="nan") if INTERPRET else False
# Interpreted, few splits are enough to have some with several chunks, and take less time.
SPLITS = 32 if ON_GPU else 2
SMALL = Size(B=3, kv=1, G=2, C=320)  # three chunks, of which one is cut off; two splits
run = functools.partial(attend, max_splits=SPLITS, interpret=POISONED)


@pytest.mark.parametrize(
    ("lengths", "valid"),
    [
        ((0, 1, 127), (1, 1, 1)),
        ((128, 129, 318), (1, 1, 1)),
        ((319, 320, 820), (1, 1, 1)),  # the last slot, then the ring begins again
        ((0, 64, 300), (0, 0, 0)),  # no key at all, and no new one
        ((100, 0, 127), (0, 1, 1)),
    ],
)
def test_matches_reference(lengths, valid, seed):
    case = make_case(SMALL, lengths, seed, valid)
    assert_right(run(*case, num_groups=2), case)


@pytest.mark.parametrize(
    ("size", "lengths"),
    [
        (Size(B=1, kv=2, G=8, C=64, P=3), (40,)),
        (Size(B=1, kv=2, G=12, C=128), (700,)),
        *(
            [
                (Size(B=1, kv=4, G=8, C=512, P=4), (511,)),
                (Size(B=1, kv=4, G=8, C=16384, P=4), (16000,)),
                (Size(B=8, kv=4, G=8, C=4096, P=4), range(1, 4500, 600)),
                (Size(B=64, kv=4, G=8, C=2176, P=8), range(0, 2240, 35)),
                (Size(B=2, kv=8, G=12, C=1024), (900, 1100)),
                (Size(B=2, kv=4, G=16, C=1024), (64, 1023)),
                (Size(B=3, kv=1, G=64, C=640), (5, 600, 640)),
            ]
            if ON_GPU
            else []
        ),
    ],
    ids=str,
)
def test_sizes(size, lengths, seed):
    case = make_case(size, lengths, seed)
    assert_right(run(*case), case)


@given(data=st.data())
@examples(on_cpu=4, on_gpu=50)
def test_any_batch(data):
    size = data.draw(st.sampled_from([SMALL, SMALL._replace(B=2, G=9, kv=1)]))
    rows = {"min_size": size.B, "max_size": size.B}
    lengths = data.draw(st.lists(st.integers(0, 3 * size.C), **rows))
    valid = data.draw(st.lists(st.integers(0, 1), **rows))
    case = make_case(size, lengths, data.draw(st.integers(0, 2**32 - 1)), valid)
    assert_right(run(*case, num_groups=2), case)


# --- bits


@pytest.mark.parametrize("lengths", [(150, 64, 500)])
def test_bits_do_not_depend_on_the_batch_or_the_blocks(lengths, seed):
    case = make_case(SMALL, lengths, seed)
    together = run(*case, num_groups=2)
    for row in range(SMALL.B):
        alone = run(*one_row(case, row), num_groups=1, heads_per_block=2)
        for found, expected in zip(alone, together, strict=True):
            assert_same_bits(found, expected[row : row + 1])


@pytest.mark.skipif(not ON_GPU, reason="interpret mode has no races to lose")
def test_same_input_same_bits(seed):
    case = make_case(Size(B=4, kv=4, G=8, C=4096, P=4), (4000, 65, 700, 9000), seed)
    expected, *_ = run(*case)

    @jax.jit
    def count_different(case, expected):
        def again(index, count):
            # Tied to the index, or the compiler would compute it once for all rounds.
            this_case, _ = lax.optimization_barrier((case, index))
            found, *_ = run(*this_case)
            return count + jnp.any(found.view(jnp.uint16) != expected.view(jnp.uint16))

        return lax.fori_loop(0, 1000, again, jnp.int32(0))

    assert count_different(case, expected) == 0


@pytest.mark.parametrize("max_splits", [1, 2, 32])
def test_splits_cover_all_chunks_once(max_splits):
    for num_keys in [0, 1, 128, 129, 500, 4096, 4097, 16384, 40000]:
        chunks, per_split, splits = splits_of(num_keys, max_splits)
        assert chunks == -(-num_keys // 128)
        assert splits <= max_splits
        # All of them, and no split that has nothing of them.
        assert (splits - 1) * per_split < max(chunks, 1)
        assert splits * per_split >= chunks
    assert splits_of(0, max_splits)[2] == 0


# --- what no output shows


def launch_one_by_one(*case, interpret):
    """Attend with each phase on its own launch; the race detector does not see counters."""
    *small, keys, values = case
    B, kv, C, D = keys.shape
    attention = SplitAttention(
        B=B, heads=small[0].shape[2] - 2 * kv, kv=kv, C=C, num_partials=len(small[0]), eps=1e-6,
        max_splits=2, num_groups=2,
    )  # fmt: skip
    merge = MergeSplits(attention=attention)

    def attention_kernel(block_id, *refs):
        *inputs, _, _, keys, values, sums, log_weights = refs[:13]
        *shared, full = refs[13:]
        attention.run(block_id, *inputs, keys, values, sums, log_weights, shared, full)

    flat = keys.reshape(-1, D), values.reshape(-1, D)
    *caches, sums, log_weights = launch(
        attention_kernel,
        name="attention",
        num_blocks=attention.num_blocks,
        out_type=[*map(jax.typeof, flat), *attention.out_types],
        scratch_types=[*attention.shared_types(), attention.full_type()],
        in_place={7: 0, 8: 1},
        interpret=interpret,
    )(*small, *flat)
    attended = launch(
        merge.run,
        name="merge",
        num_blocks=merge.num_blocks,
        out_type=merge.out_type,
        interpret=interpret,
    )(sums, log_weights, *small[5:7])
    return attended, *(cache.reshape(keys.shape) for cache in caches)


@pytest.mark.skipif(ON_GPU, reason="the race detector is interpret mode's")
def test_no_phase_races(seed):
    case = make_case(Size(B=1, kv=1, G=2, C=192), (130,), seed)
    assert_right(run_and_assert_no_races(launch_one_by_one, *case), case)


@pytest.mark.parametrize(
    "size",
    [
        Size(B=1, kv=4, G=8, C=512, P=4),
        pytest.param(Size(B=64, kv=4, G=8, C=4096, P=8), marks=pytest.mark.slow),
        pytest.param(Size(B=2, kv=8, G=12, C=1024), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_lowers_for_cuda(size):
    B, kv, G, C, P = size
    D = 128
    struct = jax.ShapeDtypeStruct
    rows, row = struct((B, D), jnp.float32), struct((B,), jnp.int32)
    weight, cache = struct((D,), jnp.bfloat16), struct((B, kv, C, D), jnp.bfloat16)
    qkv = struct((P, B, kv * G + 2 * kv, D), jnp.float32)
    text = lower_for_cuda(attend, qkv, rows, rows, weight, weight, row, row, cache, cache)
    for output, operand in ((0, 7), (1, 8)):
        assert f"output_tuple_indices = [{output}], operand_index = {operand}" in text
    [module] = mosaic_modules(text)
    # A signal and a wait, and no float32 sum that is added to memory in whatever order they come.
    added = re.findall(r"\b(?:red|atom)\.[\w.:]+", module)
    assert sorted(added) == ["atom.add.relaxed.gpu.global.u32", "red.add.release.gpu.global.u32"]
    assert "atomicrmw" not in module


# --- what is not accepted


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"D": 64}, NotImplementedError, "D is 64"),
        ({"C": 100}, ValueError, "C is 100; expected a multiple of 64"),
        ({"heads": 7}, ValueError, "heads is 7; expected a multiple of kv = 2"),
        ({"heads": 130}, NotImplementedError, "up to 64 heads a kv head"),
    ],
)
def test_errors_name_what_is_accepted(change, error, message):
    sizes = {"B": 1, "heads": 4, "kv": 2, "C": 64, "num_partials": 1, "eps": 1e-6} | change
    with pytest.raises(error, match=message):
        SplitAttention(**sizes)


def test_blocks_are_some_hundred():
    def groups(B, C):
        return SplitAttention(B=B, heads=32, kv=4, C=C, num_partials=1, eps=0.0).num_groups

    assert [groups(B, 640) for B in (1, 8, 32, 64)] == [5, 5, 3, 1]
    assert [groups(B, 4096) for B in (1, 2, 8, 32, 64)] == [32, 32, 11, 3, 1]
    assert groups(1, 16384) == 64
    np.testing.assert_array_equal(
        [
            MergeSplits(
                attention=SplitAttention(B=B, heads=32, kv=4, C=64, num_partials=1, eps=0.0)
            ).heads_per_block
            for B in (1, 16, 32, 64)
        ],
        [1, 1, 2, 4],
    )
