"""The two products of expert_major, as one thread block of each does them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_experts.swiglu_epilogue import (
    by_token,
    exchange_type,
    product_rows,
    store_transposed,
    swiglu_epilogue,
)
from pallas_kernels.decode_experts.token_tiles import TokenTiles
from pallas_kernels.decode_experts.weights import down_rows, gate_and_up_rows
from pallas_kernels.mosaic.device import SHARED_MEMORY_BYTES
from pallas_kernels.mosaic.grid_sync import staggered_start
from pallas_kernels.mosaic.l2_hints import copy_evict_first
from pallas_kernels.mosaic.operands import wgmma_operand
from pallas_kernels.mosaic.pipeline import mainloop, prologue
from pallas_kernels.mosaic.warpgroup import store_row

BLOCK_KS = (64, 128, 256)  # multiples of the swizzle's width, up to the widest TMA box


def tile_and_part(block_id, blocks_per_tile: int):
    """Which work a thread block of either product does: (tile of tokens, part of weight rows).

    With 24 blocks a tile, block 50 does part 2 of tile 2. Plain integer arithmetic, for Python
    ints, numpy arrays and traced scalars alike.
    """
    return block_id // blocks_per_tile, block_id % blocks_per_tile


def fit_stages(block_k: int, num_stages: int, rows: int) -> tuple[int, int]:
    """block_k and num_stages of a ring of that many rows, cut so that two blocks fit on a core.

    One block's loads go on while the other one stores its results: worth more than a long ring.
    """
    room = SHARED_MEMORY_BYTES // 2
    while block_k > min(BLOCK_KS) and 2 * stage_bytes(block_k, rows) > room:
        block_k //= 2
    return block_k, max(2, min(num_stages, room // stage_bytes(block_k, rows)))


def stage_bytes(block_k: int, rows: int) -> int:
    """Of both operands, in bf16."""
    return 2 * block_k * rows


def nothing(*_) -> None:
    """What a block of a launch of its own signals and waits for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateUp:
    """Block (tile, some neurons): hidden = silu(gate_e x) * up_e x * weight of the tile's columns.

    Hidden is [tiles * 2N, I] in split bf16: tile by tile, N rows of the high half and N of the low.

    Attributes:
      tiles: the tokens.
      H, I: of the experts.
      block_k, num_stages: of the ring of weights and tokens.
      neurons: of a block. 64 are two wgmmas, which share a load of the tokens; 32 are one. Of fewer
        than 32 some rows of the wgmma are left out, and blocks are shorter.
    """

    tiles: TokenTiles
    H: int
    I: int
    block_k: int
    num_stages: int
    neurons: int

    @property
    def blocks_per_tile(self) -> int:
        return self.I // self.neurons

    @property
    def num_blocks(self) -> int:
        return self.tiles.num_tiles * self.blocks_per_tile

    @property
    def _rows(self) -> int:
        return product_rows(self.neurons)

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        rows = self.tiles.num_tiles * 2 * self.tiles.N
        return jax.ShapeDtypeStruct((rows, self.I), jnp.bfloat16)

    def shared_types(self) -> tuple[list, Any]:
        """The stages, and what takes their place once the last of them is computed."""
        N = self.tiles.N
        stages = [
            wgmma_operand(self.num_stages, self._rows, self.block_k),
            wgmma_operand(self.num_stages, N, self.block_k),
        ]
        return stages, exchange_type(N)

    def full_type(self):
        return plgpu.Barrier(num_arrivals=3, num_barriers=self.num_stages)

    def run(
        self, block_id, table, weight_of, x, gate_up, hidden, shared, full,
        signal: Callable[[Any], None] = nothing,
    ) -> None:  # fmt: skip
        """All of one block: `hidden` is what it writes; then it calls signal(its tile's index)."""
        N, block_k, half_rows = self.tiles.N, self.block_k, self._rows // 2
        (weights_smem, x_smem), exchange_smem = shared
        index, part = tile_and_part(block_id, self.blocks_per_tile)
        tile = self.tiles.lookup(table, index)

        def multiply(acc):
            gate_row, up_row = gate_and_up_rows(tile.expert, part, self.neurons, self.I)

            def load(step, stage):
                at = pl.ds(step * block_k, block_k)
                for half, row in enumerate((gate_row, up_row)):
                    half_smem = weights_smem.at[stage, pl.ds(half * half_rows, self.neurons)]
                    piece = gate_up.at[pl.ds(row, self.neurons), at]
                    copy_evict_first(piece, half_smem, full.at[stage])
                piece = x.at[pl.ds(tile.first_row, N), at]
                copy_evict_first(piece, x_smem.at[stage], full.at[stage])

            def compute(_, stage, carry):
                plgpu.barrier_wait(full.at[stage])
                plgpu.wgmma(acc, weights_smem.at[stage], x_smem.at[stage].transpose((1, 0)))
                return carry

            staggered_start(block_id, self.num_blocks, stage_bytes(self.H, 2 * self.neurons))
            steps, num_stages = self.H // block_k, self.num_stages
            prologue(steps, num_stages, load)
            mainloop(steps, num_stages, load=load, compute=compute, init=(), wgmmas_in_flight=1)
            weights = self.tiles.load_weights(weight_of, tile, by_token(self.neurons).reduce(1))
            split = swiglu_epilogue(acc[...], weights, exchange_smem, self.neurons)
            # Lanes store all N rows: copies of the valid ones would take longer to be seen.
            neurons = pl.ds(part * self.neurons, self.neurons)
            for half, values in enumerate(split):
                hidden[pl.ds(index * (2 * N) + half * N, N), neurons] = values
            signal(index)

        accumulator = plgpu.ACC((self._rows, N), jnp.float32)
        pl.when(tile.expert >= 0)(lambda: pl.run_scoped(multiply, accumulator))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Down:
    """Block (tile, block_m neurons): row p of outputs = down_e (high + low), of p's column.

    Outputs are [num_outputs, H] float32. The rows of no column stay unwritten.
    """

    tiles: TokenTiles
    H: int
    I: int
    block_m: int
    block_k: int
    num_stages: int

    @property
    def blocks_per_tile(self) -> int:
        return self.H // self.block_m

    @property
    def num_blocks(self) -> int:
        return self.tiles.num_tiles * self.blocks_per_tile

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.tiles.num_outputs, self.H), jnp.float32)

    def shared_types(self) -> tuple[list, Any]:
        """The stages, and what takes their place once the last of them is computed."""
        N = self.tiles.N
        stages = [
            wgmma_operand(self.num_stages, self.block_m, self.block_k),
            wgmma_operand(self.num_stages, 2 * N, self.block_k),
        ]
        return stages, plgpu.SMEM((N, self.block_m), jnp.float32)

    def full_type(self):
        return plgpu.Barrier(num_arrivals=2, num_barriers=self.num_stages)

    def run(
        self, block_id, table, hidden, down, outputs, shared, full,
        wait: Callable[[Any], None] = nothing,
    ) -> None:  # fmt: skip
        """All of one block: `outputs` is what it writes.

        Once wait(its tile's index) returns, hidden may be read.
        """
        N, block_k, num_steps = self.tiles.N, self.block_k, self.I // self.block_k
        (down_smem, hidden_smem), outputs_smem = shared
        index, part = tile_and_part(block_id, self.blocks_per_tile)
        tile = self.tiles.lookup(table, index)

        def multiply(acc):
            weight_rows = pl.ds(down_rows(tile.expert, part, self.block_m, self.H), self.block_m)
            hidden_rows = pl.ds(index * (2 * N), 2 * N)

            def load_weights(step, stage):
                piece = down.at[weight_rows, pl.ds(step * block_k, block_k)]
                copy_evict_first(piece, down_smem.at[stage], full.at[stage])

            def load_hidden(step, stage):
                piece = hidden.at[hidden_rows, pl.ds(step * block_k, block_k)]
                copy_evict_first(piece, hidden_smem.at[stage], full.at[stage])

            def load(step, stage):
                load_weights(step, stage)
                load_hidden(step, stage)

            def compute(_, stage, carry):
                plgpu.barrier_wait(full.at[stage])
                plgpu.wgmma(acc, down_smem.at[stage], hidden_smem.at[stage].transpose((1, 0)))
                return carry

            # Weights depend on no other block, so they are on their way before the wait.
            prologue(num_steps, self.num_stages, load_weights)
            wait(index)
            prologue(num_steps, self.num_stages, load_hidden)
            mainloop(
                num_steps,
                self.num_stages,
                load=load,
                compute=compute,
                init=(),
                wgmmas_in_flight=1,
            )
            products = acc[...]  # [block_m, 2N]
            store_transposed(outputs_smem, products[:, :N] + products[:, N:])
            neurons = pl.ds(part * self.block_m, self.block_m)

            def store(column, row):
                store_row(outputs_smem, column, outputs.at[:, neurons], row)

            self.tiles.for_each_valid(tile, store)
            plgpu.wait_smem_to_gmem(0)

        accumulator = plgpu.ACC((self.block_m, 2 * N), jnp.float32)
        pl.when(tile.expert >= 0)(lambda: pl.run_scoped(multiply, accumulator))
