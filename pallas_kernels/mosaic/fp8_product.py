"""FP8 weights times a few tokens on the tensor cores, with nothing of the tokens rounded to FP8.

    tokens    [N, 128] bf16 or float32   ->  f16 terms, scaled by a power of two a token
    weights   [rows, 128] e4m3           ->  f16 in registers, every value exact
    products  f16 x f16, float32 sums of 128 columns, one fresh accumulator for each scale block

No instruction of Hopper converts e4m3 to bf16, and one converts two of them to f16. A bf16 number
has 8 significant bits, so f16 holds it exactly once a power of two has moved it into f16's range.
That power is of a token and 128 columns: the largest number lands in [2^14, 2^15), and what f16
cannot hold is below 2^-38 of it. A float32 number becomes two f16 terms.

The products are warp-level, both operands in registers (fp8_mma.py).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.fp8_mma import GROUP, ROWS_BY_TOKEN, add_products, weights_type
from pallas_kernels.mosaic.fp8_operand import (
    COLUMNS,
    load_by_column,
    operand_types,
    store_operands,
)
from pallas_kernels.mosaic.operands import round_up
from pallas_kernels.mosaic.warpgroup import load_few


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Product:
    """[rows, columns] of FP8 weights times N tokens, as a pipeline's stages of block_k columns.

    Attributes:
      rows: a multiple of 2 GROUP.
      columns: a multiple of block_k.
      N: tokens, a multiple of 8.
      block_k: columns of a stage, a multiple of COLUMNS.
      num_stages: of the ring.
      dtype: the tokens'; bf16 or float32.
      scale_rows: 1, or more if the rows lie in that many scale blocks, in equal parts.
    """

    rows: int
    columns: int
    N: int
    block_k: int
    num_stages: int
    dtype: Any
    scale_rows: int = 1

    @property
    def _terms(self) -> int:
        return 1 if self.dtype == jnp.bfloat16 else 2

    @property
    def _blocks(self) -> int:
        return self.block_k // COLUMNS

    @property
    def _scales_stride(self) -> int:
        return round_up(self.columns // COLUMNS, 4)

    @property
    def stage_bytes(self) -> int:
        """Of one more stage."""
        return self.block_k * (self.rows + jnp.dtype(self.dtype).itemsize * self.N)

    @property
    def fixed_bytes(self) -> int:
        """Of what all stages share."""
        operand = 2 * self._blocks * self.N * (2 * self._terms * COLUMNS + 4)
        return operand + 4 * self.scale_rows * self._scales_stride

    def shared_types(self) -> list:
        """Weights and tokens, to be loaded; then what `compute` keeps."""
        return [
            weights_type(self.num_stages, self.scale_rows, self.rows, self.block_k),
            plgpu.SMEM((self.num_stages, self.N, self.block_k), self.dtype),
            *operand_types(2 * self._blocks, self._terms, self.N),
            plgpu.SMEM((self.scale_rows * self._scales_stride,), jnp.float32),
        ]

    def load_scales(self, shared: Any, rows: Sequence[Any]) -> None:
        """Starts to load the scale rows, each [columns / COLUMNS] float32 in global memory."""
        for index, row in enumerate(rows):
            at = pl.ds(index * self._scales_stride, self.columns // COLUMNS)
            load_few(row, shared[4].at[at])

    def zeros(self) -> list[jax.Array]:
        """Totals of no columns, of each group of rows."""
        zeros = jnp.zeros((GROUP, self.N), jnp.float32)
        return [plgpu.layout_cast(zeros, ROWS_BY_TOKEN)] * (self.rows // GROUP)

    def prepare(self, shared: Any, step: Any, stage: Any) -> None:
        """Converts the tokens of a stage that is full; `compute` may follow once all lanes have.

        Two halves take turns, so lanes may begin the next step's while others compute.
        """
        _, tokens_smem, operand, undo, _ = shared
        first = self._first(step)
        loaded = [load_by_column(tokens_smem.at[stage, :, part]) for part in self._parts]
        store_operands(
            [
                (tokens, operand.at[first + block], undo.at[first + block])
                for block, tokens in enumerate(loaded)
            ]
        )

    def compute(
        self, shared: Any, step: Any, stage: Any, totals: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """Totals + the products of a stage; block by block of COLUMNS, in order."""
        weights_smem, _, operand, undo, scales = shared
        first, per_row = self._first(step), len(totals) // self.scale_rows
        for block, part in enumerate(self._parts):
            of_rows = [
                scales[row * self._scales_stride + step * self._blocks + block]
                for row in range(self.scale_rows)
            ]
            totals = add_products(
                totals,
                weights_smem.at[stage, :, :, part],
                operand.at[first + block],
                undo.at[first + block],
                [of_rows[group // per_row] for group in range(len(totals))],
            )
        return totals

    @property
    def _parts(self) -> list:
        return [pl.ds(start, COLUMNS) for start in range(0, self.block_k, COLUMNS)]

    def _first(self, step: Any) -> Any:
        return lax.rem(step, jnp.int32(2)) * self._blocks
