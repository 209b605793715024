"""SplitProduct with FP8 weights: the same blocks, splits and partial sums, half the bytes.

    weights    [64, 512] e4m3, all of a block's on their way at once: 32 KB, and 320 blocks of q, k
               and v are what 132 cores hold with three blocks each
    tokens     bf16's values in registers  ->  f16, scaled by a power of two    (mosaic/fp8_operand)
    products   of 128 columns, a scale block: a fresh accumulator               (mosaic/fp8_mma)

A token's power of two is of those 128 columns alone, and scale blocks are added in order. So its
sums have the same bits in every batch.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled_fp8 import BLOCK
from pallas_kernels.decode_step.split_product import BLOCK_M, SPLIT_COLUMNS, SplitProduct
from pallas_kernels.mosaic.fp8_mma import (
    GROUP,
    ROWS_BY_TOKEN,
    add_products,
    weights_in_registers,
    weights_type,
)
from pallas_kernels.mosaic.fp8_operand import BY_COLUMN, COLUMNS, store_operands
from pallas_kernels.mosaic.l2_hints import copy_evict_first
from pallas_kernels.mosaic.mailbox import Piece, collect, post
from pallas_kernels.mosaic.warpgroup import TILE_ROWS, load_few, sync_lanes

# Of one pass over a block's weights; with more the sums would not leave registers for three blocks.
_MOST_TOKENS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitProductFp8(SplitProduct):
    """SplitProduct whose weights_0, weights_1, ... are BlockScaledFp8 in blocks of 128 x 128.

    Rows and columns are multiples of 128.
    """

    @property
    def bytes_read(self) -> int:
        """Of values and scales."""
        values = sum(self.rows) * self.columns
        return values + 4 * values // (BLOCK[0] * BLOCK[1])

    @property
    def block_k(self) -> int:
        return COLUMNS

    @property
    def num_stages(self) -> int:
        """One for each step: nothing is refilled."""
        return self.steps

    @property
    def _at_once(self) -> int:
        """Steps whose tokens are converted together."""
        return self.steps if self.N == TILE_ROWS else 1

    def shared_types(self) -> tuple:
        tokens = min(self.N, _MOST_TOKENS)
        passes = -(-self.N // _MOST_TOKENS)
        # Two buffers take turns, unless all is converted at once.
        buffers = self._at_once * min(2, passes * self.steps // self._at_once)
        return (
            [
                weights_type(self.steps, 1, BLOCK_M, COLUMNS),
                plgpu.SMEM((buffers, 1, tokens, COLUMNS), jnp.float16),
                plgpu.SMEM((buffers, tokens), jnp.float32),
                plgpu.SMEM((self.num_splits * self.steps,), jnp.float32),
            ],
        )

    def barrier_types(self) -> Any:
        return plgpu.Barrier(num_arrivals=1, num_barriers=self.steps)

    def run(self, block_id, arrays, shared, full, wait, signal) -> None:
        """Block s * row_blocks + r does rows 64 r of split s."""
        ((weights_smem, _, _, scales_smem),) = shared
        split, row_block = lax.div(block_id, self.row_blocks), lax.rem(block_id, self.row_blocks)

        def load_weights(index, first_row):
            weight, rows = arrays[f"weights_{index}"], pl.ds(first_row, BLOCK_M)
            for step in range(self.steps):
                columns = pl.ds((split * self.steps + step) * COLUMNS, COLUMNS)
                piece = weight.values.at[rows, columns]
                to = weights_smem.at[step, 0]
                copy_evict_first(piece, to, full.at[step], by_one_lane=True)
            scales = weight.scales.at[lax.div(first_row, BLOCK[0])]
            load_few(scales, scales_smem.at[pl.ds(0, self.columns // COLUMNS)])

        self._pause(block_id)
        # Weights depend on no other block, so they are on their way before the wait.
        self._of_own_weights(row_block, load_weights)
        wait(self.after)
        out = self._place(arrays["partials"], split, row_block)
        for number, first in enumerate(range(0, self.N, _MOST_TOKENS)):
            rows = pl.ds(first, min(_MOST_TOKENS, self.N - first))
            totals = self._multiply(arrays["tokens"], split, number, rows, shared, full)
            for group, total in enumerate(totals):
                part = out.at[rows, pl.ds(group * GROUP, GROUP)]
                post(part, total, ROWS_BY_TOKEN, limit=self.T, transposed=True)
        signal()

    def _multiply(self, tokens, split, number: int, rows: Any, shared, full) -> list[jax.Array]:
        """The sums of some tokens, the number-th ones: of two groups of weight rows."""
        ((weights_smem, operand, undo, scales_smem),) = shared
        rounds, some = self.steps // self._at_once, pl.ds(0, rows.size)
        zeros = jnp.zeros((GROUP, rows.size), jnp.float32)
        totals = [plgpu.layout_cast(zeros, ROWS_BY_TOKEN)] * 2
        ahead = self._load_tokens(tokens, split, range(self._at_once), rows)

        def one_round(index, carry):
            totals, ahead = carry
            steps = [index * self._at_once + place for place in range(self._at_once)]
            # Two buffers take turns, so lanes may begin the next one while others compute.
            first_buffer = (number * rounds + index) % 2 * self._at_once
            blocks = [
                (operand.at[first_buffer + place, :, some], undo.at[first_buffer + place, some])
                for place in range(self._at_once)
            ]
            store_operands([(found, *block) for found, block in zip(ahead, blocks, strict=True)])
            if rounds > 1:
                following = [jnp.minimum(step + self._at_once, self.steps - 1) for step in steps]
                ahead = self._load_tokens(tokens, split, following, rows)
            sync_lanes()
            for step, (terms, factors) in zip(steps, blocks, strict=True):
                if number == 0:
                    plgpu.barrier_wait(full.at[step])
                scale = self._scale(scales_smem, split, step)
                weights = weights_in_registers(weights_smem.at[step])
                totals = add_products(totals, weights, terms, factors, [scale] * 2)
            return totals, ahead

        # No loop of one round, because its numbers would not be known.
        carry = totals, ahead
        totals, _ = (
            one_round(0, carry) if rounds == 1 else lax.fori_loop(0, rounds, one_round, carry)
        )
        return totals

    def _load_tokens(self, tokens, split, steps: Sequence[Any], rows: Any) -> list[jax.Array]:
        """Of each step its columns of some tokens, [tokens, COLUMNS] bf16.

        Beyond the end they are zeros in a mailbox, else the last ones, because weights are zeros.
        """
        starts = [(split * self.steps + step) * COLUMNS for step in steps]
        columns = [pl.ds(jnp.minimum(at, self.columns - COLUMNS), COLUMNS) for at in starts]
        if not self.mailed:
            places = [tokens.at[rows, part] for part in columns]
            return [plgpu.load(place, layout=BY_COLUMN, optimized=False) for place in places]
        limits = [self._if_there(split, step, self.T, 0) for step in steps]
        pieces = [
            Piece(tokens.at[:, part], BY_COLUMN, limit=limit)
            for part, limit in zip(columns, limits, strict=True)
        ]
        return [words.astype(jnp.bfloat16) for words in collect(pieces)]

    def _scale(self, scales_smem, split, step: Any) -> jax.Array:
        """The scale of a step's weights; of those beyond the end, which are zeros, 0."""
        scale = scales_smem[split * self.steps + step]
        return self._if_there(split, step, scale, 0.0)

    def _if_there(self, split, step: Any, value: Any, otherwise: Any) -> Any:
        """The value, if a step's columns are before the end."""
        if self.columns % SPLIT_COLUMNS == 0 or self.num_splits == 1:
            return value
        is_there = (split * self.steps + step) * COLUMNS < self.columns
        return jnp.where(is_there, value, otherwise)
