"""Each expert's tokens side by side, in one launch: what comes before the launches of expert_major.

    ids --> tiles of one expert each   (every program, from the ids: tiles.py)
    x   --> rows of those tiles        (each program its share of the assignments)

XLA takes six kernels for the same, the Grouping being most of them. No program waits for another,
so this also runs where a barrier of the whole grid would not.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.decode_experts import gated
from pallas_kernels.decode_experts.gather_share import gather_share
from pallas_kernels.decode_experts.grouping import Grouping
from pallas_kernels.decode_experts.tiles import Tiles, pad_ids
from pallas_kernels.decode_experts.token_tiles import Tile

# Each program looks at all ids. Measured up to so many (1024 tokens, K = 8), where that is still
# faster than XLA's kernels for each step of the grouping, which do it beyond.
MOST_ASSIGNMENTS = 8192
_INTERPRETED_PROGRAMS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gathered:
    """TokenTiles whose rows of x lie side by side, P of them; one nobody owns may hold anything.

    Attributes:
      rows: [P, H] bf16, a token's x for each of its assignments.
      weight_of: [P] float32, the routing weight of each row.
      row_of: [T, K] int32, the row of assignment (t, k); -1 where it is padding.
      table: [2 * P / N + 1] int32, of each tile its expert, -1 where it is unused, and how many of
        its rows, the first ones, have an owner; at the end, how many tiles are used.
      N: rows of a tile.
    """

    rows: jax.Array
    weight_of: jax.Array
    row_of: jax.Array
    table: jax.Array
    N: int

    @property
    def count(self) -> int:
        return self.rows.shape[0] // self.N

    @property
    def num_outputs(self) -> int:
        return self.rows.shape[0]

    @property
    def operands(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.table, self.weight_of, self.rows

    def used(self, table: Any) -> jax.Array:
        return table[2 * self.count]

    def find(self, table: Any, index: jax.Array) -> Tile:
        expert, owned = table[2 * index], table[2 * index + 1]
        return Tile(expert, first_row=index * self.N, owners=owned)

    def for_each_owned(self, tile: Tile, do: Callable[[Any, Any], None]) -> None:
        lax.fori_loop(0, tile.owners, lambda column, _: do(column, tile.first_row + column), None)

    def load_weights(self, weights: Any, tile: Tile) -> jax.Array:
        return gated.load_weights(weights.at[pl.ds(tile.first_row, self.N)])


def gather_grouped(x: jax.Array, grouping: Grouping) -> Gathered:
    """The same by XLA, for any number of tokens, from a Grouping."""
    N = grouping.token_tile
    experts = grouping.expert_of.reshape(-1, N)
    owned = jnp.sum(experts >= 0, axis=1, dtype=jnp.int32)
    return Gathered(
        # A row that nobody owns gets some token's values: the columns of a product do not mix, and
        # nothing reads that column.
        rows=x[jnp.maximum(grouping.token_of, 0)],
        weight_of=grouping.weight_of,
        row_of=grouping.row_of,
        table=jnp.concatenate(
            [
                jnp.stack([experts[:, 0], owned], axis=1).reshape(-1),
                jnp.sum(owned > 0, dtype=jnp.int32)[None],
            ]
        ),
        N=N,
    )


def gather_rows(
    x: jax.Array, expert_ids: jax.Array, expert_weights: jax.Array, tiles: Tiles, interpret
) -> Gathered:
    """Finds the tiles and gathers the rows, at most MOST_ASSIGNMENTS of them.

    Args:
      x: [T, H] bf16.
      expert_ids: [T, K] int32; ids outside [0, E) are padding and get no row.
      expert_weights: [T, K] float32; padding's may be anything.
      tiles: of that T, K and E.
      interpret: as in decode_experts.
    """
    T, K = expert_ids.shape
    programs = min(mosaic.core_count(), T * K)
    num_programs = _INTERPRETED_PROGRAMS if interpret else programs

    def kernel(
        ids_gmem, x_gmem, weights_gmem, rows_gmem, weight_gmem, row_gmem, table_gmem, tables
    ):  # fmt: skip
        program = lax.axis_index("program")
        finish = gather_share(
            tiles, tables, program, num_programs,
            x_gmem, weights_gmem, rows_gmem, weight_gmem, row_gmem,
        )  # fmt: skip
        num_tiles = tiles.find(ids_gmem, tables, interpret)
        tiles.store_table(tables, num_tiles, program, num_programs, table_gmem)
        finish()

    struct = jax.ShapeDtypeStruct
    rows, weight_of, row_of, table = plgpu.kernel(
        kernel,
        out_type=(
            struct((tiles.rows, x.shape[1]), jnp.bfloat16),
            struct((tiles.rows,), jnp.float32),
            struct((T * K,), jnp.int32),
            struct((2 * tiles.most + 1,), jnp.int32),
        ),
        grid=(num_programs,),
        grid_names=("program",),
        scratch_types={"tables": tiles.scratch_types()},
        kernel_name="gather_rows",
        interpret=mosaic.interpret_params(interpret),
    )(pad_ids(expert_ids), x, expert_weights.reshape(T * K))
    return Gathered(
        rows=rows, weight_of=weight_of, row_of=row_of.reshape(T, K), table=table, N=tiles.N
    )
