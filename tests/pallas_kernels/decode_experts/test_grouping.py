"""group() against a plain loop, and tile_capacity against every possible routing."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.decode_experts.grouping import (
    LARGEST_TOKEN_TILE,
    Grouping,
    fitting_token_tile,
    group,
    tile_capacity,
)
from tests.pallas_kernels.decode_experts.cases import INT32_MAX, INT32_MIN
from tests.pallas_kernels.machine import examples

# (T, K, E); each compiles once for each tile.
SIZES = [(1, 1, 1), (1, 8, 128), (3, 2, 4), (5, 3, 3), (20, 2, 3), (40, 4, 6)]
TOKEN_TILES = [8, 16, LARGEST_TOKEN_TILE]


def group_by_loop(ids, weights, E: int, token_tile: int, capacity: int) -> Grouping:
    T, K = ids.shape
    row_of = np.full((T, K), -1, np.int32)
    token_of = np.full(capacity * token_tile, -1, np.int32)
    expert_of = np.full(capacity * token_tile, -1, np.int32)
    weight_of = np.zeros(capacity * token_tile, np.float32)
    next_tile = 0
    for expert in range(E):
        owners = [(t, k) for t in range(T) for k in range(K) if ids[t, k] == expert]
        for rank, (t, k) in enumerate(owners):
            row = next_tile * token_tile + rank
            row_of[t, k], token_of[row], expert_of[row] = row, t, expert
            weight_of[row] = weights[t, k]
        next_tile += -(-len(owners) // token_tile)
    assert next_tile <= capacity
    return Grouping(
        row_of=row_of,
        token_of=token_of,
        expert_of=expert_of,
        weight_of=weight_of,
        token_tile=token_tile,
    )


@functools.cache
def jitted_group(E, token_tile):
    return jax.jit(functools.partial(group, num_experts=E, token_tile=token_tile))


def assert_grouped(ids, E, token_tile):
    ids = np.asarray(ids, np.int32)
    T, K = ids.shape
    # Another weight for each assignment, and what must go nowhere for padding.
    weights = 0.5 + np.arange(T * K, dtype=np.float32).reshape(T, K)
    weights[(ids < 0) | (ids >= E)] = np.nan
    expected = group_by_loop(ids, weights, E, token_tile, tile_capacity(T, K, E, token_tile))
    found = jitted_group(E, token_tile)(ids, weights)
    assert found.token_tile == token_tile
    chex.assert_type([found.row_of, found.token_of, found.expert_of], jnp.int32)
    chex.assert_type(found.weight_of, jnp.float32)
    chex.assert_trees_all_equal(found, expected)


@examples(on_cpu=80, on_gpu=80)
@given(data=st.data())
def test_matches_a_loop(data):
    T, K, E = data.draw(st.sampled_from(SIZES), label="T, K, E")
    # Few distinct ids as often as many, so that experts fill several tiles.
    pool = data.draw(
        st.lists(
            st.integers(-2, E + 1) | st.sampled_from([INT32_MIN, INT32_MAX]), min_size=1, max_size=6
        ),
        label="pool",
    )
    ids = data.draw(
        st.lists(st.sampled_from(pool), min_size=T * K, max_size=T * K), label="expert_ids"
    )
    token_tile = data.draw(st.sampled_from(TOKEN_TILES), label="token_tile")
    assert_grouped(np.reshape(ids, (T, K)), E, token_tile)


def test_docstring_example():
    # Its tiles have two rows for short; the smallest real one has eight.
    grouping = group(jnp.array([[0, 2], [2, 5], [2, 0]]), jnp.ones((3, 2)), 6, token_tile=8)
    chex.assert_trees_all_equal(grouping.row_of, jnp.array([[0, 8], [9, 16], [10, 1]]))
    assert_grouped([[0, 2], [2, 5], [2, 0]], 6, 8)


@pytest.mark.parametrize("value", [0, 2, -1, 3, INT32_MAX])
def test_all_alike(value):
    assert_grouped(np.full((40, 4), value), 3, 8)


@pytest.mark.parametrize("token_tile", [1, 2, 3, 8])
@pytest.mark.parametrize("E", [1, 2, 3, 4])
def test_capacity_is_the_most_tiles_of_any_routing(E, token_tile):
    for assignments in range(1, 13):
        most = max(
            sum(-(-count // token_tile) for count in counts)
            for counts in itertools.product(range(assignments + 1), repeat=E)
            if sum(counts) <= assignments  # the rest is padding
        )
        assert tile_capacity(assignments, 1, E, token_tile) == most
        if assignments % 2 == 0:
            assert tile_capacity(assignments // 2, 2, E, token_tile) == most


@pytest.mark.parametrize(
    ("T", "K", "E", "token_tile"), [(40, 4, 6, 8), (33, 2, 3, 16), (3, 2, 9, 8)]
)
def test_worst_routing_fills_the_capacity(T, K, E, token_tile):
    # One assignment for every expert that can have one, the rest on the last.
    ids = np.minimum(np.arange(T * K), min(T * K, E) - 1).reshape(T, K)
    grouping = group(jnp.asarray(ids), jnp.ones((T, K)), E, token_tile=token_tile)
    first_rows = grouping.expert_of[::token_tile]
    chex.assert_shape(first_rows, (tile_capacity(T, K, E, token_tile),))
    chex.assert_trees_all_equal(first_rows >= 0, jnp.ones(first_rows.shape, bool))


@pytest.mark.parametrize("T", [1, 40, 128])
def test_default_token_tile_is_one_that_group_takes(T):
    ids, weights = jnp.zeros((T, 2), jnp.int32), jnp.ones((T, 2))
    default = group(ids, weights, 3)
    chex.assert_trees_all_equal(default, group(ids, weights, 3, token_tile=default.token_tile))


@pytest.mark.parametrize(
    ("T", "tile"), [(1, 8), (127, 8), (128, 16), (255, 16), (256, 24), (512, 40), (10**5, 64)]
)
def test_token_tile_is_more_than_the_mean_of_an_expert(T, tile):
    assert fitting_token_tile(T, 8, 128) == tile
