import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_experts.token_tiles import WholeBatchTiles
from pallas_kernels.mosaic.device import launch
from tests.pallas_kernels.machine import INTERPRET


def _found(tiles: WholeBatchTiles) -> np.ndarray:
    """[T * K, 1 + N]: each assignment's expert, and the rows of its columns, -1 of padding."""

    def kernel(index, ids_gmem, found_gmem):
        tile = tiles.lookup(ids_gmem, index)
        found_gmem[index, 0] = tile.expert
        for column in range(tiles.N):
            found_gmem[index, 1 + column] = jnp.int32(-1)

        def store(column, row):
            found_gmem[index, 1 + column] = row

        tiles.for_each_valid(tile, store)

    return np.asarray(
        launch(
            kernel,
            name="lookup",
            num_blocks=tiles.num_tiles,
            out_type=jax.ShapeDtypeStruct((tiles.num_tiles, 1 + tiles.N), jnp.int32),
            interpret=INTERPRET,
        )(tiles.operands[0])
    )


def _tiles(ids: np.ndarray, E: int) -> WholeBatchTiles:
    return WholeBatchTiles(
        x=jnp.zeros((len(ids), 64), jnp.bfloat16),
        expert_ids=jnp.asarray(ids, jnp.int32),
        expert_weights=jnp.ones(ids.shape, jnp.float32),
        E=E,
    )


def _by_hand(ids: np.ndarray, E: int, N: int) -> np.ndarray:
    """The same one tile after the other: (expert, n) has the n-th mention of each token."""
    T, K = ids.shape
    rows = {}
    for t in range(T):
        for k in range(K):
            tile = ids[t, k], (ids[t, :k] == ids[t, k]).sum()
            rows.setdefault(tile, np.full(N, -1))[t] = t * K + k
    found = np.full((T * K, 1 + N), -1)
    for (expert, _), columns in rows.items():
        leader = columns[columns >= 0][0]
        if 0 <= expert < E:
            found[leader] = [expert, *columns]
    return found


@pytest.mark.parametrize("T, K, E", [(1, 1, 1), (3, 2, 9), (8, 3, 4), (5, 4, 2)])
def test_every_expert_has_the_tokens_that_chose_it(T, K, E, seed):
    ids = np.random.default_rng(seed).integers(-1, E + 1, (T, K))
    tiles = _tiles(ids, E)
    found = _found(tiles)
    leads = found[:, 0] >= 0
    expected = _by_hand(ids, E, tiles.N)
    np.testing.assert_array_equal(found[:, 0], expected[:, 0])
    np.testing.assert_array_equal(found[leads], expected[leads])

    # Each assignment that is not padding has one column, and its own row of outputs.
    rows = found[leads, 1:]
    padding = (ids < 0) | (ids >= E)
    np.testing.assert_array_equal(np.sort(rows[rows >= 0]), np.flatnonzero(~padding))
    row_of = np.where(padding, -1, np.arange(T * K).reshape(T, K))
    np.testing.assert_array_equal(tiles.row_of, row_of)


def test_a_token_that_names_an_expert_twice_is_in_two_tiles():
    found = _found(_tiles(np.array([[1, 1], [0, 1]]), 2))
    none = [-1] * 6
    assert found[0].tolist() == [1, 0, 3, *none]  # the first mention of both
    assert found[1].tolist() == [1, 1, -1, *none]  # the second, of token 0 alone
    assert found[2].tolist() == [0, -1, 2, *none]
    assert found[3, 0] == -1


def test_what_fits():
    assert WholeBatchTiles.fit(8, 16) and WholeBatchTiles.fit(1, 128)
    assert not WholeBatchTiles.fit(9, 1)
    assert not WholeBatchTiles.fit(8, 17)
