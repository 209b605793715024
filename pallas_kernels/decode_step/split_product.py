"""A product of few tokens with rows of weights, split over the columns: W x, as partial sums.

    block (split, 64 rows)      partials[split, t, rows] = W[rows, columns of the split] x[t, ...]

Weights come from memory and tokens from L2. Rows alone would be too few blocks for all cores, so
the columns are split as well: 5120 rows of 2048 columns are 80 * 4 blocks of 64 KB of weights. A
reader adds the partial sums in order. Splits depend on the columns alone, so a token's sums have
the same bits in every batch.

A few tokens are too few rows for the tensor cores' M = 64, so the product is turned around
("swap-AB"): 64 rows of weights are M, the N tokens are columns. Columns do not mix.

A block starts to load its weights before it waits for the tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled_fp8 import dequantise
from pallas_kernels.mosaic.grid_sync import pause
from pallas_kernels.mosaic.l2_hints import copy_evict_first
from pallas_kernels.mosaic.mailbox import Piece, collect, post
from pallas_kernels.mosaic.operands import round_up, wgmma_operand
from pallas_kernels.mosaic.pipeline import mainloop, prologue
from pallas_kernels.mosaic.warpgroup import ROWS_BY_64

BLOCK_M = 64  # rows of a block: what one wgmma takes
SPLIT_COLUMNS = 512  # of the last split, those beyond the end are zeros
_BLOCK_KS = (64, 128, 256)
# Three blocks share a core, so that its memory holds nearly all of a layer's q, k and v, or o.
STAGES_BYTES = 73728


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitProduct:
    """Reads tokens [N, columns] bf16 and weights_0, weights_1, ... [rows, columns] bf16.

    Makes partials [num_splits, N, all rows] float32, or [num_splits, N, all rows / D, D]. Tokens
    in a mailbox are float32, and at most 8.

    Attributes:
      T: tokens.
      N: T, rounded up to a multiple of 8, at most 64; rows from T on may hold anything.
      rows: of each array of weights; multiples of 64.
      columns: a multiple of 64.
      after: the kind of task that writes the tokens.
      D: the last dimension of partials; 0 for all rows in one.
      mailed: whether tokens and partials are in mailboxes.
      spread_ns: over what time blocks begin to load weights, one after the other. If all asked at
        once, loads of other blocks, and polls, would stand in line behind them for microseconds.
    """

    T: int
    N: int
    rows: tuple[int, ...]
    columns: int
    after: str
    D: int = 0
    spread_ns: int = 0
    mailed: bool = False

    num_counters = 1

    @property
    def num_splits(self) -> int:
        return -(-self.columns // SPLIT_COLUMNS)

    @property
    def row_blocks(self) -> int:
        return sum(self.rows) // BLOCK_M

    @property
    def num_blocks(self) -> int:
        return self.num_splits * self.row_blocks

    @property
    def arrivals(self) -> int:
        return self.num_blocks

    @property
    def bytes_read(self) -> int:
        return 2 * sum(self.rows) * self.columns

    @property
    def out_types(self) -> dict[str, jax.ShapeDtypeStruct]:
        rows = self.row_blocks * BLOCK_M
        last = (rows // self.D, self.D) if self.D else (rows,)
        shape = (self.num_splits, self.N, *last)
        return {"partials": jax.ShapeDtypeStruct(shape, jnp.float32)}

    @property
    def block_k(self) -> int:
        """Columns of a stage: as wide as two stages allow."""
        fitting = [
            block_k
            for block_k in _BLOCK_KS
            if self.columns % block_k == 0 and 2 * self._stage_bytes(block_k) <= STAGES_BYTES
        ]
        return max(fitting, default=min(_BLOCK_KS))

    @property
    def num_stages(self) -> int:
        return min(self.steps, STAGES_BYTES // self._stage_bytes(self.block_k))

    @property
    def steps(self) -> int:
        return min(SPLIT_COLUMNS, round_up(self.columns, self.block_k)) // self.block_k

    def _stage_bytes(self, block_k: int) -> int:
        return 2 * block_k * (BLOCK_M + self.N)

    def shared_types(self) -> tuple:
        return (
            [
                wgmma_operand(self.num_stages, BLOCK_M, self.block_k),
                wgmma_operand(self.num_stages, self.N, self.block_k),
            ],
        )

    def barrier_types(self) -> Any:
        """A stage's copies: weights, and tokens unless lanes bring them."""
        return plgpu.Barrier(num_arrivals=1 if self.mailed else 2, num_barriers=self.num_stages)

    def run(self, block_id, arrays, shared, full, wait, signal) -> None:
        """Block s * row_blocks + r does rows 64 r of split s."""
        ((weights_smem, tokens_smem),) = shared
        split, row_block = lax.div(block_id, self.row_blocks), lax.rem(block_id, self.row_blocks)
        num_stages, steps, block_k = self.num_stages, self.steps, self.block_k

        def columns(step):
            return pl.ds(split * (steps * block_k) + step * block_k, block_k)

        def load_weights(step, stage):
            def load(index, first_row):
                rows = pl.ds(first_row, BLOCK_M)
                piece = arrays[f"weights_{index}"].at[rows, columns(step)]
                copy_evict_first(piece, weights_smem.at[stage], full.at[stage])

            self._of_own_weights(row_block, load)

        def load_tokens(step, stage):
            if self.mailed:
                return
            piece = arrays["tokens"].at[:, columns(step)]
            plgpu.copy_gmem_to_smem(piece, tokens_smem.at[stage], full.at[stage])

        def load(step, stage):
            load_weights(step, stage)
            load_tokens(step, stage)

        def multiply(acc):
            def compute(_, stage, carry):
                plgpu.barrier_wait(full.at[stage])
                plgpu.wgmma(acc, weights_smem.at[stage], tokens_smem.at[stage].transpose((1, 0)))
                return carry

            self._pause(block_id)
            # Weights depend on no other block, so they are on their way before the wait.
            prologue(steps, num_stages, load_weights)
            wait(self.after)
            if self.mailed:
                self._collect_tokens(arrays["tokens"], split, tokens_smem)
            prologue(steps, num_stages, load_tokens)
            mainloop(steps, num_stages, load=load, compute=compute, init=(), wgmmas_in_flight=1)
            return acc[...]  # [BLOCK_M, N]

        sums = pl.run_scoped(multiply, plgpu.ACC((BLOCK_M, self.N), jnp.float32))
        out = self._place(arrays["partials"], split, row_block)
        post(out, sums, plgpu.Layout.WGMMA, limit=self.T, transposed=True)
        signal()

    def _pause(self, block_id) -> None:
        if self.spread_ns:
            pause(block_id * (self.spread_ns // self.num_blocks))

    def _of_own_weights(self, row_block, do: Callable[[int, Any], None]) -> None:
        """Calls do(index, first row) of the array of weights that has a block's rows."""
        first = 0
        for index, rows in enumerate(self.rows):
            blocks, local = rows // BLOCK_M, row_block - first
            of_this = functools.partial(do, index, local * BLOCK_M)
            if len(self.rows) == 1:
                of_this()
            else:
                pl.when((local >= 0) & (local < blocks))(of_this)
            first += blocks

    def _collect_tokens(self, tokens, split, tokens_smem) -> None:
        """Brings a split's columns from the mailbox to the stages, which hold all of them."""
        width = self.steps * self.block_k
        places = [(step, at) for step in range(self.steps) for at in range(0, self.block_k, 64)]
        pieces = []
        for step, at in places:
            first = split * width + step * self.block_k + at
            # Columns beyond the end are zeros, and are not read.
            limit = jnp.where(first < self.columns, self.T, 0)
            first = jnp.minimum(first, self.columns - 64)
            pieces.append(Piece(tokens.at[:, pl.ds(first, 64)], ROWS_BY_64, limit=limit))
        for (step, at), values in zip(places, collect(pieces), strict=True):
            tokens_smem[step, :, pl.ds(at, 64)] = values.astype(jnp.bfloat16)
        plgpu.commit_smem()

    def _place(self, partials, split, row_block):
        if not self.D:
            return partials.at[split, :, pl.ds(row_block * BLOCK_M, BLOCK_M)]
        halves = self.D // BLOCK_M
        part = pl.ds(lax.rem(row_block, halves) * BLOCK_M, BLOCK_M)
        return partials.at[split, :, lax.div(row_block, halves), part]

    def reference(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """All partial sums in float32."""
        partials = self.out_types["partials"]
        weights = [dequantise(arrays[f"weights_{index}"]) for index in range(len(self.rows))]
        found = []
        for split in range(self.num_splits):
            part = slice(split * SPLIT_COLUMNS, (split + 1) * SPLIT_COLUMNS)
            tokens = arrays["tokens"][:, part].astype(jnp.bfloat16).astype(jnp.float32)
            sums = [
                jnp.einsum(
                    "tk,rk->tr",
                    tokens,
                    weights[index][:, part],
                    precision=lax.Precision.HIGHEST,
                )
                for index in range(len(self.rows))
            ]
            found.append(jnp.concatenate(sums, axis=1))
        return {"partials": jnp.stack(found).reshape(partials.shape)}
