"""The two products of expert_major, as one program of each does them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_experts import gated
from pallas_kernels.decode_experts.gated import NEURONS, OPERAND, ROWS, exchange_type
from pallas_kernels.decode_experts.token_tiles import TokenTiles
from pallas_kernels.decode_experts.weights import down_rows, gate_and_up_rows
from pallas_kernels.l2_hints import copy_evict_first
from pallas_kernels.mosaic import (
    SHARED_MEMORY_BYTES,
    drain_ring,
    fill_ring,
    store_row,
    tma_ring,
)
from pallas_kernels.stagger import begin_apart

COLUMNS = (64, 128, 256)  # a TMA box has at most 256 elements a side


def tile_program(program, num_blocks: int):
    """Which work a program of either product does: (tile of tokens, block of weight rows).

    Plain integer arithmetic, for Python ints, numpy arrays and traced scalars alike.
    """
    return program // num_blocks, program % num_blocks


def fit_ring(columns: int, slots: int, rows: int) -> tuple[int, int]:
    """Columns and slots of a ring of so many rows, cut so that two programs fit on a core.

    One program's loads go on while the other one stores its results: worth more than a long ring.
    """
    room = SHARED_MEMORY_BYTES // 2
    while columns > min(COLUMNS) and 2 * slot_bytes(columns, rows) > room:
        columns //= 2
    return columns, max(2, min(slots, room // slot_bytes(columns, rows)))


def slot_bytes(columns: int, rows: int) -> int:
    """Of both operands, in bf16."""
    return 2 * columns * rows


def _operand(*shape: int):
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=OPERAND)


def _nothing(tile) -> None:
    del tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateUp:
    """Program (tile, 32 neurons): hidden = silu(gate_e x) * up_e x * weight of the tile's columns.

    Hidden is [tiles * 2N, I] bf16, tile by tile N rows of hi and N of lo.
    """

    tiles: TokenTiles
    H: int
    I: int
    columns: int
    slots: int
    apart: bool  # whether programs of one core begin apart (stagger.py)

    @property
    def blocks(self) -> int:
        """Programs of a tile."""
        return self.I // NEURONS

    @property
    def programs(self) -> int:
        return self.tiles.count * self.blocks

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.tiles.count * 2 * self.tiles.N, self.I), jnp.bfloat16)

    def shared_types(self) -> tuple[list, list]:
        """The ring, and what takes its place once it has run dry."""
        N = self.tiles.N
        ring = [_operand(self.slots, ROWS, self.columns), _operand(self.slots, N, self.columns)]
        # A row begins at a multiple of 128 bytes, as the copy engine wants it.
        return ring, [exchange_type(N), plgpu.SMEM((2 * N, 2 * NEURONS), jnp.bfloat16)]

    def arrived_type(self):
        return plgpu.Barrier(num_arrivals=3, num_barriers=self.slots)

    def run(
        self, program, table, weight_of, x, gate_up, hidden, shared, arrived,
        done: Callable[[Any], None] = _nothing,
    ) -> None:  # fmt: skip
        """All of one program: `hidden` is what it writes; then it calls done(its tile's index)."""
        N, columns = self.tiles.N, self.columns
        (weights_smem, x_smem), (exchange_smem, hidden_smem) = shared
        index, block = tile_program(program, self.blocks)
        tile = self.tiles.find(table, index)

        def multiply(acc):
            gate_row, up_row = gate_and_up_rows(tile.expert, block, NEURONS, self.I)

            def copy(step, slot, arrived):
                at = pl.ds(step * columns, columns)
                for half, row in enumerate((gate_row, up_row)):
                    part = weights_smem.at[slot, pl.ds(half * NEURONS, NEURONS)]
                    copy_evict_first(gate_up.at[pl.ds(row, NEURONS), at], part, arrived)
                copy_evict_first(x.at[pl.ds(tile.first_row, N), at], x_smem.at[slot], arrived)

            def consume(_, slot, carry):
                plgpu.wgmma(acc, weights_smem.at[slot], x_smem.at[slot].transpose((1, 0)))
                return carry

            if self.apart:
                begin_apart(program, self.programs, slot_bytes(self.H, ROWS))
            tma_ring(
                self.H // columns,
                self.slots,
                barrier=arrived,
                copy=copy,
                consume=consume,
                init=(),
                wgmmas_in_flight=1,
            )
            weights = self.tiles.load_weights(weight_of, tile)
            hi_lo = gated.hidden(acc[...], weights, exchange_smem)
            for half, values in enumerate(hi_lo):
                hidden_smem[pl.ds(half * N, N), pl.ds(0, NEURONS)] = values
            plgpu.commit_smem()
            neurons = pl.ds(block * NEURONS, NEURONS)

            def store(column, _):
                for row in (column, N + column):
                    part = hidden_smem.at[:, pl.ds(0, NEURONS)]
                    store_row(part, row, hidden.at[:, neurons], index * (2 * N) + row)

            self.tiles.for_each_owned(tile, store)
            plgpu.wait_smem_to_gmem(0)
            done(index)

        accumulator = plgpu.ACC((ROWS, N), jnp.float32)
        pl.when(tile.expert >= 0)(lambda: pl.run_scoped(multiply, accumulator))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Down:
    """Program (tile, R neurons): row p of outputs = down_e (hi + lo), of the column that p is.

    Outputs are [num_outputs, H] float32. The rows of no column stay unwritten.
    """

    tiles: TokenTiles
    H: int
    I: int
    R: int
    columns: int
    slots: int

    @property
    def blocks(self) -> int:
        """Programs of a tile."""
        return self.H // self.R

    @property
    def programs(self) -> int:
        return self.tiles.count * self.blocks

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.tiles.num_outputs, self.H), jnp.float32)

    def shared_types(self) -> tuple[list, Any]:
        """The ring, and what takes its place once it has run dry."""
        N = self.tiles.N
        ring = [_operand(self.slots, self.R, self.columns)]
        ring += [_operand(self.slots, 2 * N, self.columns)]
        return ring, plgpu.SMEM((N, self.R), jnp.float32)

    def arrived_type(self):
        return plgpu.Barrier(num_arrivals=2, num_barriers=self.slots)

    def run(
        self, program, table, hidden, down, outputs, shared, arrived,
        ready: Callable[[Any], None] = _nothing,
    ) -> None:  # fmt: skip
        """All of one program: `outputs` is what it writes.

        Once ready(its tile's index) returns, hidden may be read.
        """
        N, columns, steps = self.tiles.N, self.columns, self.I // self.columns
        (down_smem, hidden_smem), outputs_smem = shared
        index, block = tile_program(program, self.blocks)
        tile = self.tiles.find(table, index)

        def multiply(acc):
            weight_rows = pl.ds(down_rows(tile.expert, block, self.R, self.H), self.R)
            hidden_rows = pl.ds(index * (2 * N), 2 * N)

            def copy_weights(step, slot):
                part = down.at[weight_rows, pl.ds(step * columns, columns)]
                copy_evict_first(part, down_smem.at[slot], arrived.at[slot])

            def copy_hidden(step, slot):
                part = hidden.at[hidden_rows, pl.ds(step * columns, columns)]
                copy_evict_first(part, hidden_smem.at[slot], arrived.at[slot])

            def copy(step, slot):
                copy_weights(step, slot)
                copy_hidden(step, slot)

            def consume(_, slot, carry):
                plgpu.barrier_wait(arrived.at[slot])
                plgpu.wgmma(acc, down_smem.at[slot], hidden_smem.at[slot].transpose((1, 0)))
                return carry

            # Weights wait for nobody.
            fill_ring(self.slots, steps, copy_weights)
            ready(index)
            fill_ring(self.slots, steps, copy_hidden)
            drain_ring(
                self.slots,
                0,
                steps,
                steps,
                copy=copy,
                consume=consume,
                init=(),
                wgmmas_in_flight=1,
            )
            products = acc[...]  # [R, 2N]
            gated.store_transposed(outputs_smem, products[:, :N] + products[:, N:])
            neurons = pl.ds(block * self.R, self.R)

            def store(column, row):
                store_row(outputs_smem, column, outputs.at[:, neurons], row)

            self.tiles.for_each_owned(tile, store)
            plgpu.wait_smem_to_gmem(0)

        accumulator = plgpu.ACC((self.R, 2 * N), jnp.float32)
        pl.when(tile.expert >= 0)(lambda: pl.run_scoped(multiply, accumulator))
