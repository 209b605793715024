"""Where each expert's rows lie: sorted by expert, each group from a multiple of 64 on.

    ids [[0, 2], [2, 5], [2, 0]], for a multiple of 4 instead of 64:
      row         0  1  2  3 | 4  5  6  7 | 8  9 10 11
      assignment  0  5  -  - | 1  2  4  - | 3  -  -  -       assignment t * K + k
      expert      0          | 2          | 5

Rows that hold no assignment are padding. Gathering writes zeros there, so a product's tiles and the
steps of a weight's gradient need no masks, and no array is copied to be padded.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic.operands import round_up

ROWS_MULTIPLE = 64  # what one wgmma takes as M, and one step of the gradient to the weights as K
BLOCK_M = 128  # rows of a tile


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """Rows of each expert, in an array of R rows.

    Attributes:
      first_row: [E] int32, multiples of 64.
      num_rows: [E] int32, multiples of 64; an expert without any has 0.
      tiles: [3 * max_tiles + 1] int32: of each tile its expert, its first row and how many rows it
        has, 64 or 128; at the end, how many tiles are used.
      R: rows of the array; the last 64 are no group's (static).
    """

    first_row: jax.Array
    num_rows: jax.Array
    tiles: jax.Array
    R: int = dataclasses.field(metadata={"static": True})

    @property
    def E(self) -> int:
        return self.first_row.shape[0]

    @property
    def max_tiles(self) -> int:
        return (self.tiles.shape[0] - 1) // 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedAssignments:
    """A batch's assignments (t, k) in their experts' rows.

    Attributes:
      groups: the rows.
      assignment_of: [R] int32, t * K + k; -1 for padding.
      row_of: [T, K] int32; -1 where the id is padding.
    """

    groups: Groups
    assignment_of: jax.Array
    row_of: jax.Array

    @property
    def K(self) -> int:
        return self.row_of.shape[1]


def max_rows(assignments: int, E: int) -> int:
    """R for any routing: a group has at most 63 rows of padding, and 64 follow the last group."""
    used = assignments + (ROWS_MULTIPLE - 1) * min(assignments, E)
    return used // ROWS_MULTIPLE * ROWS_MULTIPLE + ROWS_MULTIPLE


def group_assignments(expert_ids: jax.Array, E: int) -> GroupedAssignments:
    """Sorts a batch's assignments by expert; an expert's rows are in the order of assignments.

    Args:
      expert_ids: [T, K] int32; an id outside [0, E) is padding and gets no row.
      E: experts.
    """
    T, K = expert_ids.shape
    R = max_rows(T * K, E)
    flat = jnp.where((expert_ids >= 0) & (expert_ids < E), expert_ids, E).reshape(-1)  # [TK]
    sizes = jnp.sum(flat[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)  # [E]
    num_rows = round_up(sizes, ROWS_MULTIPLE)
    first_row = _before(num_rows)

    order = jnp.argsort(flat).astype(jnp.int32)  # stable; padding comes last
    expert = flat[order]
    nth = jnp.arange(T * K, dtype=jnp.int32) - _before(sizes)[jnp.minimum(expert, E - 1)]
    row = jnp.where(expert < E, first_row[jnp.minimum(expert, E - 1)] + nth, R)
    assignment_of = jnp.full((R,), -1, jnp.int32).at[row].set(order, mode="drop")
    row_of = jnp.zeros((T * K,), jnp.int32).at[order].set(jnp.where(row < R, row, -1))
    return GroupedAssignments(
        groups=_groups(first_row, num_rows, max_tiles(T * K, E), R),
        assignment_of=assignment_of,
        row_of=row_of.reshape(T, K),
    )


def max_tiles(assignments: int, E: int) -> int:
    """The most tiles that any routing fills: one an expert in use, and one for 128 more rows."""
    used = min(assignments, E)
    return used + (assignments - used) // BLOCK_M


def _groups(first_row: jax.Array, num_rows: jax.Array, most: int, R: int) -> Groups:
    E = first_row.shape[0]
    tiles_of = (num_rows + BLOCK_M - 1) // BLOCK_M
    end = jnp.cumsum(tiles_of, dtype=jnp.int32)
    tile = jnp.arange(most, dtype=jnp.int32)
    expert = jnp.sum(end[None] <= tile[:, None], axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, E - 1)  # of tiles that are not used
    before = (tile - (end - tiles_of)[expert]) * BLOCK_M
    rows = jnp.minimum(num_rows[expert] - before, BLOCK_M)
    table = jnp.stack([expert, first_row[expert] + before, rows], axis=1).reshape(-1)
    return Groups(first_row=first_row, num_rows=num_rows, tiles=jnp.append(table, end[E - 1]), R=R)


def _before(counts: jax.Array) -> jax.Array:
    """[E]: the sum of the counts before each."""
    return jnp.cumsum(counts, dtype=jnp.int32) - counts
