"""Each group's rows times its expert's weights, with or without swiglu, on the tensor cores.

    rows [128, k]    weights [n, k] or [k, n]    one tile of rows, one expert

wgmma takes either order of the weights in bfloat16, so they are read as they are stored. Tiles of
one expert follow each other, because then its weights and rows are in L2 when they are read again.
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
    PIECE,
    SIZE_MULTIPLE,
    GroupedMatmulConfig,
    block_n_for,
    copy_box,
    pieces_type,
    store_piece,
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

_BY_ROW = plgpu.Layout.WGMMA.reduce(1)


class _RowsTile(NamedTuple):
    expert: Any
    row: Any
    rows: Any
    column: Any


@functools.partial(jax.jit, static_argnames=("transposed", "config", "interpret"))
def rows_by_weights(
    rows: jax.Array,
    weights: jax.Array,
    groups: Groups,
    *,
    transposed: bool,
    config: GroupedMatmulConfig,
    interpret: Any,
) -> jax.Array:
    """Each group's rows times its expert's weights.

    Args:
      rows: [R, in] bf16.
      weights: [E, out, in] bf16; [E, in, out] if transposed.
      groups: whose rows are which expert's.
      transposed: whether the weights' second dimension is contracted, not the last.
      config: how to cut.
      interpret: as in mosaic.device.launch.

    Returns:
      [R, out] bf16; rows in no group are undefined.
    """
    contracted, columns = weights.shape[1:] if transposed else weights.shape[:0:-1]
    block_n = block_n_for(columns, config)
    block_k = BLOCK_K
    num_columns = columns // block_n
    shared_b = (block_k, block_n) if transposed else (block_n, block_k)

    def kernel(block_id, table, rows, weights, out, a, b, pieces, full, empty):
        def load(tile, step, stage, barrier):
            k = step * block_k
            copy_box(rows, tile.row, BLOCK_M, k, block_k, a.at[stage], barrier)
            if transposed:
                at = tile.expert * contracted + k, block_k, tile.column, block_n
            else:
                at = tile.expert * columns + tile.column, block_n, k, block_k
            copy_box(weights, *at, b.at[stage], barrier)

        def multiply(acc, stage, consumer):
            mine = a.at[stage, pl.ds(consumer * CONSUMER_ROWS, CONSUMER_ROWS)]
            theirs = b.at[stage]
            plgpu.wgmma(acc, mine, theirs if transposed else theirs.transpose((1, 0)))

        def finish(tile, value, consumer):
            row = tile.row + consumer * CONSUMER_ROWS
            store_value(value, pieces, consumer, out, row, tile.column)

        product = TileProduct(
            num_stages=config.num_stages,
            acc_shape=(CONSUMER_ROWS, block_n),
            tile=lambda index: _rows_tile(table, index, num_columns, block_n),
            num_steps=lambda _: contracted // block_k,
            load=load,
            multiply=multiply,
            finish=finish,
            takes_part=_has_rows,
        )
        num_tiles = table[3 * groups.max_tiles] * num_columns
        run_tiles(product, block_id, num_blocks, num_tiles, full, empty)

    num_blocks = core_count(interpret)
    return launch(
        kernel,
        name="grouped_matmul_transposed" if transposed else "grouped_matmul",
        num_blocks=num_blocks,
        out_type=jax.ShapeDtypeStruct((groups.R, columns), jnp.bfloat16),
        scratch_types=[
            wgmma_operand(config.num_stages, BLOCK_M, block_k),
            wgmma_operand(config.num_stages, *shared_b),
            pieces_type(),
            *barrier_types(config.num_stages, copies=2),
        ],
        num_warpgroups=NUM_WARPGROUPS,
        interpret=interpret,
    )(groups.tiles, rows, weights.reshape(-1, weights.shape[-1]))


@functools.partial(jax.jit, static_argnames=("keep_projected", "config", "interpret"))
def swiglu_by_weights(
    rows: jax.Array,
    gate_up: jax.Array,
    row_weights: jax.Array,
    groups: Groups,
    *,
    keep_projected: bool,
    config: GroupedMatmulConfig,
    interpret: Any,
) -> tuple[jax.Array, jax.Array | None]:
    """row_weights * silu(gate) * up of each group's rows, in the epilogue of one product.

    A tile has 128 neurons: their gate rows and their up rows are its 256 columns, so a lane has
    both values of a neuron.

    Args:
      rows: [R, H] bf16.
      gate_up: [E, 2, I, H] bf16.
      row_weights: [R] float32.
      groups: whose rows are which expert's.
      keep_projected: whether gate and up are stored too.
      config: how to cut.
      interpret: as in mosaic.device.launch.

    Returns:
      hidden [R, I] bf16, and gate beside up [R, 2 * I] bf16 or None. Rows in no group are
      undefined.
    """
    _, _, I, H = gate_up.shape
    neurons, block_k = SIZE_MULTIPLE, BLOCK_K
    num_columns = I // neurons

    def kernel(block_id, table, rows, weights, row_weights, *rest):
        hidden, projected = rest[0], rest[1] if keep_projected else None
        a, b, pieces, full, empty = rest[-5:]

        def load(tile, step, stage, barrier):
            k = step * block_k
            copy_box(rows, tile.row, BLOCK_M, k, block_k, a.at[stage], barrier)
            for half in range(2):
                neuron = (tile.expert * 2 + half) * I + tile.column
                to = b.at[stage, pl.ds(half * neurons, neurons)]
                copy_box(weights, neuron, neurons, k, block_k, to, barrier)

        def multiply(acc, stage, consumer):
            mine = a.at[stage, pl.ds(consumer * CONSUMER_ROWS, CONSUMER_ROWS)]
            plgpu.wgmma(acc, mine, b.at[stage].transpose((1, 0)))

        def finish(tile, value, consumer):
            row, stored = tile.row + consumer * CONSUMER_ROWS, 0
            scale = plgpu.load(
                row_weights.at[pl.ds(row, CONSUMER_ROWS)], layout=_BY_ROW, optimized=False
            )
            scale = lax.broadcast_in_dim(scale, (CONSUMER_ROWS, PIECE), (0,))
            for first in range(0, neurons, PIECE):
                gate, up = (value[:, start : start + PIECE] for start in (first, neurons + first))
                column = tile.column + first
                outputs = [(hidden, column, gate / (1 + jnp.exp(-gate)) * up * scale)]
                if keep_projected:
                    outputs += [(projected, column, gate), (projected, I + column, up)]
                for out, column, piece in outputs:
                    store_piece(piece, pieces, stored, consumer, out, row, column)
                    stored += 1

        product = TileProduct(
            num_stages=config.num_stages,
            acc_shape=(CONSUMER_ROWS, 2 * neurons),
            tile=lambda index: _rows_tile(table, index, num_columns, neurons),
            num_steps=lambda _: H // block_k,
            load=load,
            multiply=multiply,
            finish=finish,
            takes_part=_has_rows,
        )
        num_tiles = table[3 * groups.max_tiles] * num_columns
        run_tiles(product, block_id, num_blocks, num_tiles, full, empty)

    num_blocks = core_count(interpret)
    widths = (I, 2 * I) if keep_projected else (I,)
    outputs = launch(
        kernel,
        name="grouped_swiglu",
        num_blocks=num_blocks,
        out_type=[jax.ShapeDtypeStruct((groups.R, width), jnp.bfloat16) for width in widths],
        scratch_types=[
            wgmma_operand(config.num_stages, BLOCK_M, block_k),
            wgmma_operand(config.num_stages, 2 * neurons, block_k),
            pieces_type(),
            *barrier_types(config.num_stages, copies=3),
        ],
        num_warpgroups=NUM_WARPGROUPS,
        interpret=interpret,
    )(groups.tiles, rows, gate_up.reshape(-1, H), row_weights)
    return (*outputs, None)[:2]


def _rows_tile(table, index, num_columns: int, block_n: int) -> _RowsTile:
    at = lax.div(index, jnp.int32(num_columns)) * 3
    return _RowsTile(
        expert=table[at],
        row=table[at + 1],
        rows=table[at + 2],
        column=lax.rem(index, jnp.int32(num_columns)) * block_n,
    )


def _has_rows(tile: _RowsTile, consumer) -> Any:
    return tile.rows > consumer * CONSUMER_ROWS
