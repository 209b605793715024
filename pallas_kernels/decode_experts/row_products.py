"""Rows of weights times one vector on the CUDA cores, in either weight format.

A row's sum is as many sums as a piece has columns, kept in registers over all pieces. They are
added up once, at the end:

    row r of the weights   | piece 0 | piece 1 | ...        sums[r, c] += row[c] * vector[c]
    sums[r, :]                  +=        +=                 sum of sums[r, :], once

A lane reads 16 bytes of a row at a time: 8 neighbouring columns of bf16, 16 of e4m3. So a piece has
64 columns of bf16, or the 128 columns of an FP8 scale block. The scale is multiplied with the
vector, in float32, because that is one product for all rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled_fp8 import BLOCK, VALUES_DTYPE, BlockScaledFp8
from pallas_kernels.mosaic.operands import round_up
from pallas_kernels.mosaic.warpgroup import load_few, sync_lanes

_BYTES = 16  # that a lane loads at a time


@dataclasses.dataclass(frozen=True)
class RowProducts:
    """How rows of one format are read and multiplied.

    Attributes:
      quantised: whether weights are BlockScaledFp8.
    """

    quantised: bool

    @property
    def dtype(self) -> Any:
        return VALUES_DTYPE if self.quantised else jnp.bfloat16

    @property
    def piece(self) -> int:
        """Columns whose products go to sums of their own."""
        return 8 * self._columns

    @property
    def _columns(self) -> int:
        return _BYTES // jnp.dtype(self.dtype).itemsize

    @property
    def _tile(self) -> Any:
        """Rows in registers: 4 warps by 4 rows, 8 lanes along a row; its last sum is 3 shuffles."""
        tiling = plgpu.Tiling(((16, self.piece), (4, self._columns)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2, -3), vector_dim=-1)

    def pieces(self, block_k: int) -> list:
        return [pl.ds(start, self.piece) for start in range(0, block_k, self.piece)]

    def zeros(self, block_m: int) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros((block_m, self.piece), jnp.float32), self._tile)

    def load_vector(self, vector_smem: Any) -> jax.Array:
        """[piece] of bf16 or float32 in shared memory."""
        # Several loads for a lane, which Mosaic does not count as optimised.
        return plgpu.load(vector_smem, layout=self._tile.reduce(0), optimized=False)

    def products(self, rows_smem: Any, vector: jax.Array, scale: Any = None) -> jax.Array:
        """[M, piece] in shared memory times [piece] times a scalar: [M, piece] float32."""
        rows = plgpu.load(rows_smem, layout=self._tile).astype(jnp.float32)
        vector = vector.astype(jnp.float32)
        if scale is not None:
            vector *= scale
        spread = lax.broadcast_in_dim(vector, rows.shape, (1,))
        return rows * plgpu.layout_cast(spread, self._tile)

    def along_rows(self, sums: jax.Array) -> jax.Array:
        """[M, piece] to [M]."""
        return plgpu.layout_cast(jnp.sum(sums, axis=1), self._tile.reduce(1))


@dataclasses.dataclass(frozen=True)
class RowScales:
    """The scales of some rows of a weight, in shared memory; nothing for a plain weight.

    Attributes:
      count: scale rows.
      columns: of the weight.
    """

    count: int
    columns: int

    @property
    def _stride(self) -> int:
        return round_up(-(-self.columns // BLOCK[1]), 4)

    def shared_types(self, weight: Any) -> list:
        """What `load` fills, if there is anything."""
        if not isinstance(weight, BlockScaledFp8):
            return []
        return [plgpu.SMEM((self.count * self._stride,), jnp.float32)]

    def load(self, weight: Any, rows: Sequence[Any], smem: Any) -> None:
        """Loads the scales of the blocks that hold these rows of the weight; all lanes wait."""
        if not isinstance(weight, BlockScaledFp8):
            return
        for index, row in enumerate(rows):
            of_row = weight.scales.at[lax.div(row, jnp.int32(weight.block[0]))]
            load_few(of_row, smem.at[pl.ds(index * self._stride, of_row.shape[0])])
        sync_lanes()

    def at(self, weight: Any, index: Any, block: Any, smem: Any) -> Any:
        """The scale of a row's block of columns; None for a plain weight."""
        if not isinstance(weight, BlockScaledFp8):
            return None
        return smem[index * self._stride + block]


def values_of(weight: Any) -> Any:
    """What is streamed of a weight: all of a plain one."""
    return weight.values if isinstance(weight, BlockScaledFp8) else weight
