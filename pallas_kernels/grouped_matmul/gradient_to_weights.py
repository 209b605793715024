"""The gradient to the weights: each group's rows contracted with their cotangents.

    cotangent [r, m]^T    rows [r, n]    one expert, all its rows

wgmma takes both operands transposed in bfloat16, so rows are read as they are stored. Padding rows
are zeros, so that no step needs a mask.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.groups import BLOCK_M, Groups
from pallas_kernels.grouped_matmul.tiles import (
    BLOCK_K,
    CONSUMER_ROWS,
    GroupedMatmulConfig,
    block_n_for,
    copy_box,
    pieces_type,
    store_value,
)
from pallas_kernels.mosaic.device import core_count, launch
from pallas_kernels.mosaic.operands import wgmma_operand
from pallas_kernels.mosaic.warp_specialised import (
    NUM_WARPGROUPS,
    TileProduct,
    barrier_types,
    run_tiles,
)


class _WeightsTile(NamedTuple):
    first_row: Any
    num_rows: Any
    out_row: Any
    row_column: Any
    column: Any


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def gradient_to_weights(
    cotangent: jax.Array,
    rows: jax.Array,
    groups: Groups,
    *,
    config: GroupedMatmulConfig,
    interpret: Any,
) -> jax.Array:
    """cotangent^T rows of each group; zeros for an expert without rows.

    Args:
      cotangent: [R, out] bf16. A row of padding in a group is zeros here or in `rows`, and finite
        in the other.
      rows: [R, in] bf16.
      groups: whose rows are which expert's.
      config: how to cut.
      interpret: as in mosaic.device.launch.

    Returns:
      [E, out, in] bf16.
    """
    m, n = cotangent.shape[1], rows.shape[1]
    block_m, block_n, block_k = BLOCK_M, block_n_for(n, config), BLOCK_K
    across, down = n // block_n, m // block_m

    def kernel(block_id, first_row, num_rows, cotangent, rows, out, a, b, pieces, full, empty):
        def tile_at(index):
            expert = lax.div(index, jnp.int32(down * across))
            within = lax.rem(index, jnp.int32(down * across))
            column = lax.div(within, jnp.int32(across)) * block_m
            return _WeightsTile(
                first_row=first_row[expert],
                num_rows=num_rows[expert],
                out_row=expert * m + column,
                row_column=column,
                column=lax.rem(within, jnp.int32(across)) * block_n,
            )

        def load(tile, step, stage, barrier):
            row = tile.first_row + step * block_k
            copy_box(cotangent, row, block_k, tile.row_column, block_m, a.at[stage], barrier)
            copy_box(rows, row, block_k, tile.column, block_n, b.at[stage], barrier)

        def multiply(acc, stage, consumer):
            mine = a.at[stage, :, pl.ds(consumer * CONSUMER_ROWS, CONSUMER_ROWS)]
            plgpu.wgmma(acc, mine.transpose((1, 0)), b.at[stage])

        def finish(tile, value, consumer):
            row = tile.out_row + consumer * CONSUMER_ROWS
            store_value(value, pieces, consumer, out, row, tile.column)

        product = TileProduct(
            num_stages=config.num_stages,
            acc_shape=(CONSUMER_ROWS, block_n),
            tile=tile_at,
            num_steps=lambda tile: lax.div(tile.num_rows, jnp.int32(block_k)),
            load=load,
            multiply=multiply,
            finish=finish,
        )
        num_tiles = jnp.int32(groups.E * down * across)
        run_tiles(product, block_id, num_blocks, num_tiles, full, empty)

    num_blocks = core_count(interpret)
    return launch(
        kernel,
        name="grouped_matmul_to_weights",
        num_blocks=num_blocks,
        out_type=jax.ShapeDtypeStruct((groups.E * m, n), jnp.bfloat16),
        scratch_types=[
            wgmma_operand(config.num_stages, block_k, block_m),
            wgmma_operand(config.num_stages, block_k, block_n),
            pieces_type(),
            *barrier_types(config.num_stages, copies=2),
        ],
        num_warpgroups=NUM_WARPGROUPS,
        interpret=interpret,
    )(groups.first_row, groups.num_rows, cotangent, rows).reshape(groups.E, m, n)
