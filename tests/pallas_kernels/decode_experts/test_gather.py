"""Gathered rows against a plain loop, in one launch and by XLA; the schedule's capacity."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.decode_experts.expert_schedule import (
    MAX_BLOCK_N,
    ExpertSchedule,
    default_block_n,
    max_tiles,
)
from pallas_kernels.decode_experts.gather import gather_by_kernel, gather_by_xla
from pallas_kernels.decode_experts.token_tiles import GatheredTiles
from tests.pallas_kernels.decode_experts.cases import INT32_MAX, INT32_MIN
from tests.pallas_kernels.machine import INTERPRET, ON_GPU, examples

# Rows of 2048: more assignments than a block loads at once.
_SIZES = [(1, 2, 3, 8, 192), (20, 2, 5, 8, 2048), (7, 3, 130, 16, 192)]
if ON_GPU:
    _SIZES += [(T, 8, 128, N, 2048) for T in (1, 8, 64, 128, 256, 512, 1024) for N in (8, 64)]

# (T, K, E) of the generated cases; each compiles once for each block_n.
_GENERATED = [(1, 1, 1), (3, 2, 4), (5, 3, 3), (40, 4, 6)]


def by_loop(ids: np.ndarray, schedule: ExpertSchedule) -> tuple[np.ndarray, ...]:
    """(row_of [T, K], token_of [P], expert_of [P]), -1 where there is none."""
    row_of = np.full(ids.shape, -1)
    token_of, expert_of = np.full((2, schedule.rows), -1)
    tile = 0
    for expert in range(schedule.E):
        chosen = np.argwhere(ids == expert)
        for rank, (t, k) in enumerate(chosen):
            row = tile * schedule.block_n + rank
            row_of[t, k], token_of[row], expert_of[row] = row, t, expert
        tile += -(-len(chosen) // schedule.block_n)
    assert tile <= schedule.max_tiles
    return row_of, token_of, expert_of


def assert_gathered(found: GatheredTiles, x, ids, weights, schedule: ExpertSchedule) -> None:
    ids = np.asarray(ids)
    row_of, token_of, expert_of = by_loop(ids, schedule)
    N = schedule.block_n
    assert found.N == N and found.num_tiles == schedule.max_tiles
    np.testing.assert_array_equal(found.row_of, row_of)
    table = np.reshape(found.table[:-1], (-1, 2))
    valid = token_of >= 0
    np.testing.assert_array_equal(table[:, 0], expert_of[::N])
    np.testing.assert_array_equal(table[:, 1], valid.reshape(-1, N).sum(axis=1))
    assert found.table[-1] == (table[:, 1] > 0).sum()
    np.testing.assert_array_equal(
        np.asarray(found.rows, np.float32)[valid], np.asarray(x, np.float32)[token_of[valid]]
    )
    routed = row_of >= 0
    np.testing.assert_array_equal(
        np.asarray(found.weight_of)[row_of[routed]], np.asarray(weights)[routed]
    )


@pytest.mark.parametrize("T, K, E, N, H", _SIZES)
def test_in_one_launch(T, K, E, N, H, seed):
    rng = np.random.default_rng(seed)
    # A popular expert with several tiles; padding on both sides.
    ids = np.where(rng.random((T, K)) < 0.5, 1, rng.integers(-1, E + 2, (T, K)))
    x = jax.random.normal(jax.random.key(seed), (T, H), jnp.bfloat16)
    weights = jnp.asarray(rng.random((T, K)), jnp.float32)
    schedule = ExpertSchedule(T=T, K=K, E=E, block_n=N)
    arguments = x, jnp.asarray(ids, jnp.int32), weights, schedule
    assert_gathered(gather_by_kernel(*arguments, INTERPRET), *arguments)


@functools.cache
def _jitted_by_xla(schedule: ExpertSchedule):
    return jax.jit(functools.partial(gather_by_xla, schedule=schedule))


def assert_gathered_by_xla(ids, E: int, block_n: int) -> None:
    ids = np.asarray(ids, np.int32)
    T, K = ids.shape
    schedule = ExpertSchedule(T=T, K=K, E=E, block_n=block_n)
    # Another value for each token and assignment, and what must go nowhere for padding.
    x = np.arange(T, dtype=np.float32)[:, None]
    weights = 0.5 + np.arange(T * K, dtype=np.float32).reshape(T, K)
    weights[(ids < 0) | (ids >= E)] = np.nan
    found = _jitted_by_xla(schedule)(x, ids, weights)
    assert_gathered(found, x, ids, weights, schedule)


@examples(on_cpu=30, on_gpu=60)
@given(data=st.data())
def test_by_xla(data):
    T, K, E = data.draw(st.sampled_from(_GENERATED), label="T, K, E")
    # Few distinct ids as often as many, so that experts fill several tiles.
    an_id = st.integers(-2, E + 1) | st.sampled_from([INT32_MIN, INT32_MAX])
    pool = data.draw(st.lists(an_id, min_size=1, max_size=6), label="pool")
    ids = data.draw(
        st.lists(st.sampled_from(pool), min_size=T * K, max_size=T * K), label="expert_ids"
    )
    block_n = data.draw(st.sampled_from([8, MAX_BLOCK_N]), label="block_n")
    assert_gathered_by_xla(np.reshape(ids, (T, K)), E, block_n)


def test_the_schedules_example():
    # Its tiles have two rows for short; the smallest real one has eight.
    ids = np.array([[0, 2], [2, 5], [2, 0]], np.int32)
    row_of, *_ = by_loop(ids, ExpertSchedule(T=3, K=2, E=6, block_n=8))
    assert row_of.tolist() == [[0, 8], [9, 16], [10, 1]]
    assert_gathered_by_xla(ids, 6, 8)


@pytest.mark.parametrize("value", [2, -1, 3])
def test_all_alike(value):
    assert_gathered_by_xla(np.full((40, 4), value), 3, 8)


@pytest.mark.parametrize("block_n", [1, 2, 3, 8])
@pytest.mark.parametrize("E", [1, 2, 3, 4])
def test_capacity_is_the_most_tiles_of_any_routing(E, block_n):
    for assignments in range(1, 13):
        most = max(
            sum(-(-count // block_n) for count in counts)
            for counts in itertools.product(range(assignments + 1), repeat=E)
            if sum(counts) <= assignments  # the rest is padding
        )
        assert max_tiles(assignments, 1, E, block_n) == most
        if assignments % 2 == 0:
            assert max_tiles(assignments // 2, 2, E, block_n) == most


@pytest.mark.parametrize(
    ("T", "block_n"), [(1, 8), (127, 8), (128, 16), (255, 16), (256, 24), (512, 40), (10**5, 64)]
)
def test_block_n_is_more_than_the_mean_of_an_expert(T, block_n):
    assert default_block_n(T, 8, 128) == block_n
