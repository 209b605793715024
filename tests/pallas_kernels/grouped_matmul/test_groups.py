"""Where group_assignments puts each assignment, against a plain loop, for any ids."""

import functools

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul.groups import (
    BLOCK_M,
    ROWS_MULTIPLE,
    group_assignments,
    max_rows,
    max_tiles,
)
from tests.pallas_kernels.machine import examples

T, K, E = 70, 2, 4  # so that an expert can have two tiles and more
run = functools.partial(jax.jit, static_argnums=1)(group_assignments)


def by_loop(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, int]]]:
    """(assignment_of [R], row_of [T, K], tiles), of plain Python."""
    assignment_of = np.full(max_rows(T * K, E), -1)
    row_of, tiles, row = np.full(T * K, -1), [], 0
    for expert in range(E):
        chosen = np.flatnonzero(ids == expert)
        assignment_of[row : row + chosen.size] = chosen
        row_of[chosen] = row + np.arange(chosen.size)
        end = row + -(-chosen.size // ROWS_MULTIPLE) * ROWS_MULTIPLE
        tiles += [(expert, at, min(end - at, BLOCK_M)) for at in range(row, end, BLOCK_M)]
        row = end
    assert row + ROWS_MULTIPLE <= assignment_of.size  # a tile's load may reach 64 rows further
    return assignment_of, row_of.reshape(T, K), tiles


@examples(on_cpu=40, on_gpu=200)
@given(st.data())
def test_rows_and_tiles(data):
    # Few different ids, so that groups are large, and missing experts common.
    some = st.sampled_from(data.draw(st.lists(st.integers(-1, E), min_size=1, max_size=3)))
    ids = np.array(data.draw(st.lists(some, min_size=T * K, max_size=T * K)), np.int32)
    found = run(ids.reshape(T, K), E)
    assignment_of, row_of, tiles = by_loop(ids)
    np.testing.assert_array_equal(found.assignment_of, assignment_of)
    np.testing.assert_array_equal(found.row_of, row_of)
    groups = found.groups
    assert assignment_of.size == groups.R and groups.max_tiles == max_tiles(T * K, E) >= len(tiles)
    assert groups.tiles[-1] == len(tiles)
    table = np.reshape(groups.tiles[:-1], (-1, 3))[: len(tiles)]
    assert [tuple(tile) for tile in table] == tiles
    np.testing.assert_array_equal(
        groups.num_rows, [sum(rows for e, _, rows in tiles if e == expert) for expert in range(E)]
    )


def test_capacity_is_reached_and_no_more():
    # One expert in use for each assignment, and one expert for all.
    assert max_rows(3, 8) == 3 * ROWS_MULTIPLE + ROWS_MULTIPLE
    assert max_tiles(3, 8) == 3
    assert max_tiles(BLOCK_M + 1, 1) == 2
    # A group of 65 rows has two wgmmas' worth in one tile, and each other group one.
    assert max_rows(65 + 1, 2) == 3 * ROWS_MULTIPLE + ROWS_MULTIPLE
