import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_experts.gather_rows import gather_grouped, gather_rows
from pallas_kernels.decode_experts.grouping import group
from pallas_kernels.decode_experts.tiles import Tiles
from tests.pallas_kernels.machine import INTERPRET, ON_GPU

# Rows of 2048: more assignments than a program loads at once.
_SIZES = [(1, 2, 3, 8, 192), (20, 2, 5, 8, 2048), (7, 3, 130, 16, 192)]
if ON_GPU:
    _SIZES += [(T, 8, 128, N, 2048) for T in (1, 8, 64, 128, 256, 512, 1024) for N in (8, 64)]


@pytest.mark.parametrize("T, K, E, N, H", _SIZES)
def test_the_same_as_by_a_grouping(T, K, E, N, H, seed):
    rng = np.random.default_rng(seed)
    # A popular expert with several tiles; padding on both sides.
    ids = np.where(rng.random((T, K)) < 0.5, 1, rng.integers(-1, E + 2, (T, K))).astype(np.int32)
    ids = jnp.asarray(ids)
    x = jax.random.normal(jax.random.key(seed), (T, H), jnp.bfloat16)
    weights = jnp.asarray(rng.random((T, K)), jnp.float32)

    found = gather_rows(x, ids, weights, Tiles(T=T, K=K, E=E, N=N), INTERPRET)
    grouping = group(ids, weights, E, token_tile=N)
    expected = gather_grouped(x, grouping)

    assert found.N == expected.N == N and found.count == expected.count
    found_tiles, tiles = (np.reshape(part.table[:-1], (-1, 2)) for part in (found, expected))
    used = tiles[:, 0] >= 0
    assert found.table[-1] == expected.table[-1] == used.sum()
    np.testing.assert_array_equal(found_tiles[used], tiles[used])
    np.testing.assert_array_equal(found_tiles[~used, 0], -1)
    np.testing.assert_array_equal(found.row_of, expected.row_of)
    owned = np.asarray(grouping.token_of) >= 0
    np.testing.assert_array_equal(tiles[:, 1], owned.reshape(-1, N).sum(axis=1))
    assert owned.sum() == ((ids >= 0) & (ids < E)).sum()
    for field in ("rows", "weight_of"):
        np.testing.assert_array_equal(
            np.asarray(getattr(found, field), np.float32)[owned],
            np.asarray(getattr(expected, field), np.float32)[owned],
        )
