"""Each expert's tokens side by side, in one launch: what comes before the launches of expert_major.

    ids --> tiles of one expert each   (every program, from the ids: tiles.py)
    x   --> rows of those tiles        (each program its share of the assignments)

XLA takes six kernels for the same, the Grouping being most of them. No program waits for another,
so this also runs where a barrier of the whole grid would not.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.decode_experts.grouping import Grouping
from pallas_kernels.decode_experts.tiles import Tiles, pad_ids

# Each program looks at all ids, one after the other. Measured up to so many (128 tokens, K = 8);
# beyond, XLA's kernels for each step of the grouping do it.
MOST_ASSIGNMENTS = 1024
_INTERPRETED_PROGRAMS = 2


class Gathered(NamedTuple):
    """Rows of x in tiles of N, P rows in all. A row without an owner may hold anything.

    Attributes:
      rows: [P, H] bf16, a token's x for each of its assignments.
      weight_of: [P] float32, the routing weight of each row.
      row_of: [T, K] int32, the row of assignment (t, k); -1 where it is padding.
      expert_of: [P / N] int32 or longer, the expert of each tile; -1 where it is unused.
    """

    rows: jax.Array
    weight_of: jax.Array
    row_of: jax.Array
    expert_of: jax.Array


def gather_grouped(x: jax.Array, grouping: Grouping) -> Gathered:
    """The same by XLA, for any number of tokens, from a Grouping."""
    return Gathered(
        # A row that nobody owns gets some token's values: the columns of a product do not mix, and
        # nothing reads that column.
        rows=x[jnp.maximum(grouping.token_of, 0)],
        weight_of=grouping.weight_of,
        row_of=grouping.row_of,
        expert_of=grouping.expert_of[:: grouping.token_tile],
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
        ids_gmem, x_gmem, weights_gmem, rows_gmem, weight_gmem, row_gmem, expert_gmem, tables
    ):  # fmt: skip
        program = lax.axis_index("program")
        finish = tiles.gather(
            tables, program, num_programs, x_gmem, weights_gmem, rows_gmem, weight_gmem, row_gmem
        )
        tiles.find(ids_gmem, tables)
        pl.when(program == 0)(lambda: tiles.store_experts(tables, expert_gmem))
        finish()

    struct = jax.ShapeDtypeStruct
    rows, weight_of, row_of, expert_of = plgpu.kernel(
        kernel,
        out_type=(
            struct((tiles.rows, x.shape[1]), jnp.bfloat16),
            struct((tiles.rows,), jnp.float32),
            struct((T * K,), jnp.int32),
            struct(tiles.scratch_types()["expert_of"].shape, jnp.int32),
        ),
        grid=(num_programs,),
        grid_names=("program",),
        scratch_types={"tables": tiles.scratch_types()},
        kernel_name="gather_rows",
        interpret=mosaic.interpret_params(interpret),
    )(pad_ids(expert_ids), x, expert_weights.reshape(T * K))
    return Gathered(rows, weight_of, row_of.reshape(T, K), expert_of)
