"""FP8 weights times a few tokens on the tensor cores, with nothing of the tokens rounded to FP8.

    tokens    [N, 128] bf16 or float32   ->  f16 terms, scaled by a power of two a token
    weights   [rows, 128] e4m3           ->  f16 in registers, every value exact
    products  f16 x f16, float32 sums of 128 columns, one fresh accumulator for each scale block

No instruction of Hopper converts e4m3 to bf16, and one converts two of them to f16. A bf16 number
has 8 significant bits, so f16 holds it exactly once a power of two has moved it into f16's range.
That power is of a token and 128 columns: the largest number lands in [2^14, 2^15), and what f16
cannot hold is below 2^-38 of it. A float32 number becomes two f16 terms.

Tokens are converted before the first product, or in a few chunks where all would take too much
shared memory. Weights come through a ring of stages, and leave it for registers:

    each step    wait until full   load weights   wait for all lanes   refill   convert, multiply

The products are warp-level, both operands in registers (fp8_mma.py).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.fp8_mma import (
    GROUP,
    ROWS_BY_TOKEN,
    add_products,
    weights_in_registers,
    weights_type,
)
from pallas_kernels.mosaic.fp8_operand import COLUMNS
from pallas_kernels.mosaic.fp8_tokens import load_tokens, store_tokens
from pallas_kernels.mosaic.operands import round_up
from pallas_kernels.mosaic.pipeline import mainloop
from pallas_kernels.mosaic.warpgroup import start_few, sync_lanes, wait_for_few

# Of converted tokens: with two stages of 16 KB, or five of 8, three blocks fit on a core.
OPERAND_BYTES = 32 << 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Product:
    """[rows, columns] of FP8 weights times N tokens, as a pipeline's stages of block_k columns.

    Attributes:
      rows: a multiple of 2 GROUP.
      columns: a multiple of block_k.
      N: tokens, a multiple of 8.
      T: tokens that are there; N, or fewer if N is 8. The other sums may be anything.
      block_k: columns of a stage, a multiple of COLUMNS.
      num_stages: of the ring.
      dtype: the tokens'; bf16 or float32.
      scale_rows: 1, or more if the rows lie in that many scale blocks, in equal parts.
      steps_at_once: see mainloop's `several`; as many as divide the steps, and as there are stages.
    """

    rows: int
    columns: int
    N: int
    T: int
    block_k: int
    num_stages: int
    dtype: Any
    scale_rows: int = 1
    steps_at_once: int = 1

    @property
    def num_steps(self) -> int:
        return self.columns // self.block_k

    @property
    def _terms(self) -> int:
        return 1 if self.dtype == jnp.bfloat16 else 2

    @property
    def _blocks(self) -> int:
        """Scale blocks of a stage."""
        return self.block_k // COLUMNS

    @property
    def _chunk_steps(self) -> int:
        """Steps whose tokens are converted at once, as many as fit."""
        of_step = 2 * self.block_k * self._terms * self.T
        return _largest_divisor(self.num_steps, max(1, OPERAND_BYTES // of_step))

    @property
    def _chunk_blocks(self) -> int:
        return self._chunk_steps * self._blocks

    @property
    def _operand_type(self) -> Any:
        rows = self.T if self.T >= 8 else round_up(self.T, 2)
        return plgpu.SMEM((self._chunk_blocks, self._terms, rows, COLUMNS), jnp.float16)

    @property
    def _undo_size(self) -> int:
        return self._chunk_blocks * self.N

    @property
    def _scales_stride(self) -> int:
        return round_up(self.columns // COLUMNS, 4)

    @property
    def stage_bytes(self) -> int:
        """Of one more stage."""
        return self.block_k * self.rows

    @property
    def fixed_bytes(self) -> int:
        """Of what all stages share."""
        numbers = self._undo_size + self.scale_rows * self._scales_stride
        return 2 * math.prod(self._operand_type.shape) + 4 * numbers

    def shared_types(self) -> list:
        """Weights, to be loaded; then what the product keeps, the small things in one array.

        An array begins at a multiple of 1 KB, and three blocks share a core.
        """
        numbers = self._undo_size + self.scale_rows * self._scales_stride
        return [
            weights_type(self.num_stages, self.scale_rows, self.rows, self.block_k),
            self._operand_type,
            plgpu.SMEM((numbers,), jnp.float32),
        ]

    def start_scales(self, shared: Any, rows: Sequence[Any]) -> None:
        """Starts to load the scale rows, each [columns / COLUMNS] float32 in global memory."""
        for index, row in enumerate(rows):
            at = pl.ds(self._undo_size + index * self._scales_stride, self.columns // COLUMNS)
            start_few(row, shared[2].at[at])

    def load_tokens(self, tokens: Any, wanted: Sequence[Any], step: Any = 0) -> Any:
        """A chunk of [T, columns] in global memory, from a step on, for `multiply` to convert.

        Of each token `wanted` says whether it is; a bool. The other sums may be anything.
        """
        return load_tokens(tokens, wanted, jnp.int32(step) * self._blocks, self._chunk_blocks)

    def multiply(
        self, shared: Any, full: Any, load: Any, tokens: Any, wanted: Sequence[Any], loaded: Any
    ) -> list:
        """The sums of each group of rows, [GROUP, N] float32 in the layout ROWS_BY_TOKEN.

        Args:
          shared: see shared_types.
          full: a Barrier with num_barriers=num_stages.
          load: load(step, stage) starts the copies of weights; the prologue has run.
          tokens, wanted: see load_tokens.
          loaded: what it has returned.
        """
        weights_smem, operand, numbers = shared
        undo = numbers.at[pl.ds(0, self._undo_size)]

        def convert(loaded):
            store_tokens(loaded, wanted, operand, undo, self._chunk_blocks, self.dtype)

        convert(loaded)
        wait_for_few()

        def convert_next(step):
            loaded = self.load_tokens(tokens, wanted, step)
            sync_lanes()  # others may still read the last chunk
            convert(loaded)

        def take(step, stage):
            if self._chunk_steps < self.num_steps:
                begins = (step > 0) & (lax.rem(step, jnp.int32(self._chunk_steps)) == 0)
                pl.when(begins)(lambda: convert_next(step))
            plgpu.barrier_wait(full.at[stage])
            return [
                weights_in_registers(weights_smem.at[stage, :, :, part]) for part in self._parts
            ]

        zeros = plgpu.layout_cast(jnp.zeros((GROUP, self.N), jnp.float32), ROWS_BY_TOKEN)
        return mainloop(
            self.num_steps,
            self.num_stages,
            load=load,
            take=take,
            compute=functools.partial(self._compute, shared),
            init=[zeros] * (self.rows // GROUP),
            several=_largest_divisor(self._chunk_steps, min(self.steps_at_once, self.num_stages)),
        )

    def _compute(self, shared, step, _, totals: list, weights: list) -> list:
        """Totals + the products of a stage; block by block of COLUMNS, in order."""
        _, operand, numbers = shared
        per_row = len(totals) // self.scale_rows
        first = step * self._blocks
        in_chunk = lax.rem(step, jnp.int32(self._chunk_steps)) * self._blocks
        if self._chunk_steps == self.num_steps:
            in_chunk = first
        for block, of_block in enumerate(weights):
            of_rows = [
                numbers[self._undo_size + row * self._scales_stride + first + block]
                for row in range(self.scale_rows)
            ]
            totals = add_products(
                totals,
                of_block,
                operand.at[in_chunk + block],
                numbers.at[pl.ds((in_chunk + block) * self.N, self.N)],
                [of_rows[group // per_row] for group in range(len(totals))],
            )
        return totals

    @property
    def _parts(self) -> list:
        return [pl.ds(start, COLUMNS) for start in range(0, self.block_k, COLUMNS)]


def _largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`."""
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)
