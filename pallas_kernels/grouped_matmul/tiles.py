"""How the grouped products are cut, and the copies to and from shared memory."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.groups import BLOCK_M, ROWS_MULTIPLE
from pallas_kernels.mosaic.operands import SWIZZLE, WGMMA_TILING
from pallas_kernels.mosaic.warp_specialised import CONSUMERS

SIZE_MULTIPLE = 128  # of every width
BLOCK_K = ROWS_MULTIPLE  # of a step along the contraction: rows of an expert, too
CONSUMER_ROWS = BLOCK_M // CONSUMERS  # of one consumer
PIECE = 64  # columns that are stored at once
_SLOTS = 2  # pieces of a consumer that are stored while it fills the next


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedMatmulConfig:
    """How the products are cut.

    Attributes:
      block_n: columns of a tile, at most: 128 or 256.
      num_stages: stages of the pipeline, 2 to 4.
    """

    block_n: int = 256
    num_stages: int = 4


def check_config(config: GroupedMatmulConfig) -> None:
    """Raises a ValueError that names the field, if a config cannot be.

    A stage is given back one step late, and four fill the shared memory.
    """
    for field, accepted in (("block_n", (128, 256)), ("num_stages", (2, 3, 4))):
        value = getattr(config, field)
        if value not in accepted:
            raise ValueError(f"config.{field} is {value!r}; expected one of {list(accepted)}")


def block_n_for(columns: int, config: GroupedMatmulConfig) -> int:
    """Columns of a tile: the most that divide all columns."""
    return config.block_n if columns % config.block_n == 0 else SIZE_MULTIPLE


def copy_box(source, row, num_rows: int, column, num_columns: int, to, barrier) -> None:
    """Starts to copy a box; its first row and column are multiples of 64."""
    row, column = pl.multiple_of(row, 64), pl.multiple_of(column, 64)
    box = source.at[pl.ds(row, num_rows), pl.ds(column, num_columns)]
    plgpu.copy_gmem_to_smem(box, to, barrier)


def pieces_type() -> Any:
    """Shared memory for the pieces of a tile that are being stored."""
    shape = (CONSUMERS * _SLOTS, CONSUMER_ROWS, PIECE)
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(WGMMA_TILING, SWIZZLE))


def store_piece(piece, pieces, nth: int, consumer, out, row, column) -> None:
    """Starts to store [64, 64] as bf16, once the copy before the last has left its slot.

    Args:
      piece: float32, in the accumulator's layout.
      pieces: of pieces_type.
      nth: of this consumer's pieces of this tile.
      consumer: which one stores.
      out: the output in global memory.
      row, column: where, multiples of 64.
    """
    slot = pieces.at[consumer * _SLOTS + nth % _SLOTS]
    plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
    slot[...] = piece.astype(jnp.bfloat16)
    plgpu.commit_smem()
    row, column = pl.multiple_of(row, 64), pl.multiple_of(column, 64)
    plgpu.copy_smem_to_gmem(slot, out.at[pl.ds(row, CONSUMER_ROWS), pl.ds(column, PIECE)])


def store_value(value, pieces, consumer, out, row, column) -> None:
    """Starts to store a whole accumulator [64, n] in pieces; arguments as in store_piece."""
    for nth in range(value.shape[1] // PIECE):
        first = nth * PIECE
        piece = value[:, first : first + PIECE]
        store_piece(piece, pieces, nth, consumer, out, row, column + first)
