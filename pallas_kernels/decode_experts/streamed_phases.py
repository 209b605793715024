"""The two products of the streamed layout, and what each step of the ring copies for them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_experts import gated
from pallas_kernels.decode_experts.gated import NEURONS, ROWS
from pallas_kernels.decode_experts.streamed_shares import Share
from pallas_kernels.decode_experts.tiles import Tiles, Unit
from pallas_kernels.decode_experts.weights import down_rows, gate_and_up_rows
from pallas_kernels.l2_hints import copy_evict_first
from pallas_kernels.mosaic import drain_ring, store_row

# Of a ring whose copies know by themselves where it ends.
NO_END = 1 << 30


def _div(a, b):
    return lax.div(jnp.int32(a), jnp.int32(b))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """How a layer's work is cut.

    A unit of the gate/up phase is NEURONS intermediate neurons of a tile, their gate rows and then
    their up rows being the ROWS of one product; an item of the down phase is ROWS output neurons.

    Attributes:
      tiles: the tiles of tokens.
      columns: columns of weights in a ring slot, which has ROWS rows.
      slots: slots in the ring.
      num_programs: programs in the grid.
    """

    H: int
    I: int
    tiles: Tiles
    columns: int
    slots: int
    num_programs: int

    @property
    def N(self) -> int:
        return self.tiles.N

    @property
    def unit_blocks(self) -> int:
        return self.I // NEURONS

    @property
    def unit_steps(self) -> int:
        """Ring steps of a gate/up unit."""
        return self.H // self.columns

    @property
    def item_blocks(self) -> int:
        return self.H // ROWS

    @property
    def item_steps(self) -> int:
        """Ring steps of a down item."""
        return self.I // self.columns

    def shares(self, refs, interpret: bool) -> tuple[Share, Share]:
        """A program's units and items, once it has found the tiles."""
        num_tiles = self.tiles.find(refs.ids, refs.tables, interpret)
        self.tiles.find_experts(refs.tables)
        cuts = (self.unit_blocks, self.unit_steps), (self.item_blocks, self.item_steps)
        units, items = (
            Share(
                phase=phase,
                tiles=self.tiles,
                num_tiles=num_tiles,
                blocks=blocks,
                steps=steps,
                slots=self.slots,
                num_programs=self.num_programs,
                tables=refs.tables,
                scratch=refs.shares,
                counter=refs.counter,
            )
            for phase, (blocks, steps) in enumerate(cuts)
        )
        return units, items


@dataclasses.dataclass(frozen=True)
class Refs:
    """What the phases work on; None where a phase alone does not need it. P rows in all tiles.

    Attributes:
      ids: [T * K] int32, filled up to a multiple of 4.
      x: [T, H] bf16.
      weights: [T * K] float32.
      gate_up: [E * 2 * I, H] bf16.
      down: [E * H, I] bf16.
      rows: [P, H] bf16, the columns of the gate/up products.
      weight_of: [P] float32, the routing weight of each row.
      row_of: [T * K] int32, the row of each assignment, -1 for padding.
      hidden: [2 * P, I] bf16: of each tile N rows of hi and N rows of lo.
      outputs: [P, H] float32.
      counter: int32, see grid.counters.
      tables, shares: shared memory, see Tiles and streamed_shares.
      ring: [slots, ROWS, columns] bf16.
      tokens: [slots, 2 * N, columns] bf16, the other operand: rows of x, or hi and lo of hidden.
      ring_arrived: a barrier for each slot of both.
      gate_and_up: [N, ROWS] float32, from where a lane gets both of a neuron's products.
      products: [N, ROWS] float32, on the way to `outputs`.
    """

    ids: Any = None
    x: Any = None
    weights: Any = None
    gate_up: Any = None
    down: Any = None
    rows: Any = None
    weight_of: Any = None
    row_of: Any = None
    hidden: Any = None
    outputs: Any = None
    counter: Any = None
    tables: Any = None
    shares: Any = None
    ring: Any = None
    tokens: Any = None
    ring_arrived: Any = None
    gate_and_up: Any = None
    products: Any = None


def copy_gate_up(work: Work, refs: Refs, unit: Unit, step, slot) -> None:
    """Starts the copies of a unit's step `step`: gate rows above, up rows below."""
    for half, row in enumerate(gate_and_up_rows(unit.expert, unit.block, NEURONS, work.I)):
        _copy_half(work, refs, refs.gate_up, row, step, slot, half)


def copy_rows(work: Work, refs: Refs, unit: Unit, step, slot) -> None:
    """Starts the copy of the same step's other operand."""
    at = pl.ds(unit.tile * work.N, work.N), pl.ds(step * work.columns, work.columns)
    to = refs.tokens.at[slot, pl.ds(0, work.N)]
    copy_evict_first(refs.rows.at[at], to, refs.ring_arrived.at[slot])


def copy_down(work: Work, refs: Refs, item: Unit, step, slot) -> None:
    """Starts the copies of an item's step `step`."""
    row = down_rows(item.expert, item.block, ROWS, work.H)
    for half in range(2):
        _copy_half(work, refs, refs.down, row + half * NEURONS, step, slot, half)


def copy_hidden(work: Work, refs: Refs, item: Unit, step, slot) -> None:
    """Starts the copy of the same step's other operand."""
    at = pl.ds(item.tile * (2 * work.N), 2 * work.N), pl.ds(step * work.columns, work.columns)
    copy_evict_first(refs.hidden.at[at], refs.tokens.at[slot], refs.ring_arrived.at[slot])


def _copy_half(work: Work, refs: Refs, weights, row, step, slot, half: int) -> None:
    copy_evict_first(
        weights.at[pl.ds(row, NEURONS), pl.ds(step * work.columns, work.columns)],
        refs.ring.at[slot, pl.ds(half * NEURONS, NEURONS)],
        refs.ring_arrived.at[slot],
    )


def gate_up_phase(work: Work, refs: Refs, units: Share, copy) -> None:
    """hidden[tile] = weight * silu(gate x) * (up x), unit after unit, from a filled ring.

    Args:
      copy: as in drain_ring; steps after this phase's own may follow in the same ring.
    """

    def one_unit(index):
        unit = units.unit(index)
        # Read here, so that it need not be waited for after the products.
        weights = gated.load_weights(refs.weight_of.at[pl.ds(unit.tile * work.N, work.N)])

        def multiply(acc):
            def consume(_, slot, carry):
                plgpu.barrier_wait(refs.ring_arrived.at[slot])
                tokens = refs.tokens.at[slot, pl.ds(0, work.N)].transpose((1, 0))  # [columns, N]
                plgpu.wgmma(acc, refs.ring.at[slot], tokens)
                return carry

            _drain(work, index * work.unit_steps, work.unit_steps, copy, consume)
            return acc[...]  # [ROWS, N]

        both = pl.run_scoped(multiply, plgpu.ACC((ROWS, work.N), jnp.float32))
        for half, values in enumerate(gated.hidden(both, weights, refs.gate_and_up)):
            rows = pl.ds(unit.tile * (2 * work.N) + half * work.N, work.N)
            refs.hidden[rows, pl.ds(unit.block * NEURONS, NEURONS)] = values

    units.for_each(one_unit)


def _drain(work: Work, first, count, copy, consume) -> None:
    drain_ring(
        work.slots,
        first,
        count,
        NO_END,
        copy=copy,
        consume=consume,
        init=(),
        wgmmas_in_flight=0,
    )


def down_phase(work: Work, refs: Refs, items: Share, first_step, copy) -> None:
    """outputs[tile] = down_e hidden[tile], item after item.

    Args:
      first_step: the ring's number of this phase's first step.
      copy: as in drain_ring.
    """

    def one_item(index):
        item = items.unit(index)

        def multiply(acc):
            def consume(_, slot, carry):
                plgpu.barrier_wait(refs.ring_arrived.at[slot])
                hidden = refs.tokens.at[slot].transpose((1, 0))  # [columns, 2N]
                plgpu.wgmma(acc, refs.ring.at[slot], hidden)
                return carry

            first = first_step + index * work.item_steps
            _drain(work, first, work.item_steps, copy, consume)
            return acc[...]  # [ROWS, 2N]

        hi_lo = pl.run_scoped(multiply, plgpu.ACC((ROWS, 2 * work.N), jnp.float32))
        gated.store_transposed(refs.products, hi_lo[:, : work.N] + hi_lo[:, work.N :])
        outputs = refs.outputs.at[:, pl.ds(item.block * ROWS, ROWS)]
        first = item.tile * work.N

        def store(column, _):
            store_row(refs.products, column, outputs, first + column)

        lax.fori_loop(0, item.owned, store, None)

    items.for_each(one_item)
    plgpu.wait_smem_to_gmem(0)
