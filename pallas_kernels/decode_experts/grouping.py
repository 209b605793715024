"""Which token rows each expert gets: the metadata of the expert-major layout.

The assignments (t, k) of each expert are compacted into tiles of `token_tile` rows. A tile holds
rows of one expert only; tiles are ordered by expert, an expert's rows by assignment:

    ids [[0, 2], [2, 5], [2, 0]], token_tile 2:
      tile 0: expert 0, tokens 0 2     tile 1: expert 2, tokens 0 1
      tile 2: expert 2, tokens 2 -     tile 3: expert 5, tokens 1 -
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.decode_experts.arrays import expect_array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouping:
    """Routed assignments compacted by expert. P = rows in all tiles, used or not.

    Attributes:
      row_of: [T, K] int32, the compacted row of assignment (t, k); -1 where it is padding.
      token_of: [P] int32, the token of each compacted row; -1 where nobody owns the row.
      expert_of: [P] int32, the expert of each compacted row, -1 likewise. A tile's first row is
        owned if any is: expert_of[tile * token_tile] is the tile's expert, -1 if it is unused.
      weight_of: [P] float32, the routing weight of each compacted row, 0 where nobody owns it.
      token_tile: rows in a tile (static), a multiple of 8 up to 64.
    """

    row_of: jax.Array
    token_of: jax.Array
    expert_of: jax.Array
    weight_of: jax.Array
    token_tile: int = dataclasses.field(metadata={"static": True})


LEAST_TOKEN_TILE = 8
LARGEST_TOKEN_TILE = 64


def check_token_tile(token_tile: int) -> None:
    """Raises a ValueError unless the tensor cores take as many columns."""
    tiles = range(LEAST_TOKEN_TILE, LARGEST_TOKEN_TILE + 1, LEAST_TOKEN_TILE)
    if not isinstance(token_tile, int) or token_tile not in tiles:
        raise ValueError(
            f"token_tile is {token_tile}; expected a multiple of {LEAST_TOKEN_TILE} from "
            f"{LEAST_TOKEN_TILE} to {LARGEST_TOKEN_TILE}"
        )


def fitting_token_tile(T: int, K: int, E: int) -> int:
    """The smallest multiple of 8 that is more than an expert's mean number of tokens, or 64.

    Fewer rows and a popular expert's weights are read again for its further tiles; more, and tiles
    are padded. Within 1% of the fastest at T = 32 to 512, where it was measured (Qwen3-30B-A3B's
    layer, uniform routing: results/designs/token_tile.md).
    """
    more_than_mean = (T * K // (E * LEAST_TOKEN_TILE) + 1) * LEAST_TOKEN_TILE
    return min(more_than_mean, LARGEST_TOKEN_TILE)


def tile_capacity(T: int, K: int, E: int, token_tile: int) -> int:
    """The most tiles that any routing of T * K assignments over E experts can fill.

    With u experts in use there are at most u + (T*K - u) // token_tile tiles, which grows with u.
    """
    u = min(T * K, E)
    return u + (T * K - u) // token_tile


def group(
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    num_experts: int,
    *,
    token_tile: int = 8,
) -> Grouping:
    """Compacts the assignments of each expert into tiles.

    1. rank[a]: how many earlier assignments chose a's expert.
    2. row[a] = rank[a] + token_tile * (tiles of all lower experts).
    3. token_of, expert_of and weight_of turn row_of around.

    A running count for each expert gives ranks; a scatter to distinct rows turns them around.

    Args:
      expert_ids: [T, K] int32; ids outside [0, num_experts) are padding and get no row.
      expert_weights: [T, K] float32; padding's may be anything.
      num_experts: E.
      token_tile: rows in a tile, a multiple of 8 from 8 to 64. More rows read a very popular
        expert's weights less often, and cost more token traffic for all the others; see
        fitting_token_tile.

    Returns:
      The Grouping, with capacity for every routing of this shape.

    Raises:
      ValueError: token_tile is not one that the tensor cores take, or a shape does not fit.
      TypeError: a dtype does not fit.
    """
    check_token_tile(token_tile)
    expect_array("expert_ids", expert_ids, "[T, K]", jnp.int32)
    expect_array("expert_weights", expert_weights, "[T, K]", jnp.float32)
    T, K = expert_ids.shape
    if expert_weights.shape != (T, K):
        raise ValueError(
            f"expert_weights has shape {expert_weights.shape}; expected [T, K] = {(T, K)}"
        )
    E, P = num_experts, token_tile * tile_capacity(T, K, num_experts, token_tile)
    ids = expert_ids.reshape(-1)  # [TK]
    valid = (ids >= 0) & (ids < E)
    chosen = ids[:, None] == jnp.arange(E, dtype=jnp.int32)  # [TK, E]
    counts = jnp.cumsum(chosen, axis=0, dtype=jnp.int32)
    rank = jnp.sum(jnp.where(chosen, counts, 0), axis=1) - 1
    tiles = -(-counts[-1] // token_tile)  # [E]
    first_row = token_tile * (jnp.cumsum(tiles) - tiles)
    row = jnp.where(valid, first_row[jnp.where(valid, ids, 0)] + rank, -1)  # [TK]

    place = jnp.where(valid, row, P)  # P is outside, and dropped

    def turned(empty, values):
        return jnp.full(P, empty, values.dtype).at[place].set(values, mode="drop")

    return Grouping(
        row_of=row.reshape(T, K),
        token_of=turned(-1, jnp.arange(T * K, dtype=jnp.int32) // K),
        expert_of=turned(-1, ids),
        weight_of=turned(0, expert_weights.reshape(-1)),
        token_tile=token_tile,
    )
