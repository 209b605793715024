"""The two phases of the streamed layout: what one program does, on either side of the barrier."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_experts.streamed_columns import ROWS
from pallas_kernels.decode_experts.weights import down_rows, gate_and_up_rows
from pallas_kernels.mosaic import drain_ring, fill_ring

# How wgmma operands lie in shared memory: 8 x 64 tiles of bf16 under the 128-byte swizzle.
OPERAND = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def _div(a, b):
    return lax.div(jnp.int32(a), jnp.int32(b))


def _divmod(a, b):
    """Quotient and remainder of numbers that are not negative."""
    return _div(a, b), lax.rem(jnp.int32(a), jnp.int32(b))


@dataclasses.dataclass(frozen=True)
class Work:
    """How a layer's work is cut and dealt out: unit or item w goes to program w % num_programs.

    Attributes:
      N: columns of a tile.
      columns: columns of weights in a ring slot, which has ROWS rows.
      slots: slots in the ring, an even number.
      column_slots: slots of the other operand, at least slots // 2. One serves two slots of gate
        and up rows; hidden's copies run so much less ahead than those of down weights.
      num_programs: programs in the grid.
    """

    H: int
    I: int
    N: int
    columns: int
    slots: int
    column_slots: int
    num_programs: int

    @property
    def unit_steps(self) -> int:
        """Ring steps of a gate/up unit: a slot of gate rows and one of up rows, by turns."""
        return 2 * (self.H // self.columns)

    @property
    def blocks(self) -> int:
        """Gate/up units of a tile: ROWS intermediate neurons each."""
        return self.I // ROWS

    @property
    def splits(self) -> int:
        """Ranges that the down product's contraction over I is cut into, whatever the routing."""
        return self.I // self.columns

    @property
    def items(self) -> int:
        return self.H // ROWS * self.splits

    def units_of(self, program, num_tiles):
        units = num_tiles * self.blocks
        return _div(units + self.num_programs - 1 - program, self.num_programs)

    def items_of(self, program):
        # From the other end: with few experts the last programs have no gate/up unit.
        return _div(self.items + program, self.num_programs)

    def unit(self, program, index):
        """(tile, block of intermediate neurons) of a program's index-th gate/up unit."""
        return _divmod(program + index * self.num_programs, self.blocks)

    def item(self, program, index):
        """(block of output neurons, split) of a program's index-th item."""
        return _divmod(self.num_programs - 1 - program + index * self.num_programs, self.splits)


@dataclasses.dataclass(frozen=True)
class Refs:
    """What both phases work on.

    Attributes:
      rows: [P, H] bf16, the columns of the gate/up products.
      routing: the arrays that say whose columns they are.
      gate_up: [E * 2 * I, H] bf16.
      down: [E * H, I] bf16.
      hidden: [2 * N * tiles, I] bf16: of each tile N rows of hi and N rows of lo.
      partials: [splits, rows, H] float32.
      tables: shared memory that says which expert each tile has, and for which tokens.
      sums: shared memory for the down phase's sums, if they are kept there.
      weights_smem: [slots, ROWS, columns], the ring.
      columns_smem: [column_slots, 2 * N, columns], the other operand.
      hidden_smem: [2 * N, ROWS], on the way from registers to `hidden`.
      gate_up_arrived: a barrier for each two slots.
      down_arrived: a barrier for each slot.
      hidden_arrived: a barrier for each column slot.
    """

    rows: Any = None
    routing: Any = None
    gate_up: Any = None
    down: Any = None
    hidden: Any = None
    partials: Any = None
    tables: Any = None
    sums: Any = None
    weights_smem: Any = None
    columns_smem: Any = None
    hidden_smem: Any = None
    gate_up_arrived: Any = None
    down_arrived: Any = None
    hidden_arrived: Any = None


def copy_gate_up(work: Work, columns, refs: Refs, program, step, slot) -> None:
    """Starts the copies of step `step` of the program's gate/up units.

    Even steps bring gate rows and the columns that both halves are multiplied by.
    """
    index, step_of_unit = _divmod(step, work.unit_steps)
    tile, block = work.unit(program, index)
    pair, is_up = _divmod(step_of_unit, 2)
    at = pl.ds(pair * work.columns, work.columns)
    gate_row, up_row = gate_and_up_rows(columns.expert(refs.tables, tile), block, ROWS, work.I)
    arrived = refs.gate_up_arrived.at[_div(slot, 2)]
    plgpu.copy_gmem_to_smem(
        refs.gate_up.at[pl.ds(jnp.where(is_up == 1, up_row, gate_row), ROWS), at],
        refs.weights_smem.at[slot],
        arrived,
    )

    @pl.when(is_up == 0)
    def _():
        plgpu.copy_gmem_to_smem(
            refs.rows.at[pl.ds(columns.first_row(tile), work.N), at],
            refs.columns_smem.at[_div(slot, 2), pl.ds(0, work.N)],
            arrived,
        )


def copy_down(work: Work, columns, refs: Refs, program, num_tiles, step, slot) -> None:
    """Starts the copy of the weights of step `step` of the program's down items."""
    index, tile = _divmod(step, num_tiles)
    block, split = work.item(program, index)
    row = down_rows(columns.expert(refs.tables, tile), block, ROWS, work.H)
    plgpu.copy_gmem_to_smem(
        refs.down.at[pl.ds(row, ROWS), pl.ds(split * work.columns, work.columns)],
        refs.weights_smem.at[slot],
        refs.down_arrived.at[slot],
    )


def copy_hidden(work: Work, refs: Refs, program, num_tiles, step) -> None:
    """Starts the copy of the other operand of that step, which the first phase has written."""
    index, tile = _divmod(step, num_tiles)
    _, split = work.item(program, index)
    slot = lax.rem(step, jnp.int32(work.column_slots))
    plgpu.copy_gmem_to_smem(
        refs.hidden.at[
            pl.ds(tile * (2 * work.N), 2 * work.N), pl.ds(split * work.columns, work.columns)
        ],
        refs.columns_smem.at[slot],
        refs.hidden_arrived.at[slot],
    )


def gate_up_phase(work: Work, columns, refs: Refs, program, num_tiles, end, copy) -> None:
    """hidden[tile] = weight * silu(gate x) * (up x), unit after unit, from a filled ring.

    Args:
      end, copy: as in drain_ring; steps after this phase's own may follow in the same ring.
    """

    def unit_body(index, _):
        tile, block = work.unit(program, index)

        def multiply(gate_acc, up_acc):
            def consume(_, slots, carry):
                gate_slot, up_slot = slots
                plgpu.barrier_wait(refs.gate_up_arrived.at[_div(gate_slot, 2)])
                tokens = refs.columns_smem.at[_div(gate_slot, 2), pl.ds(0, work.N)]
                tokens = tokens.transpose((1, 0))  # [columns, N]
                plgpu.wgmma(gate_acc, refs.weights_smem.at[gate_slot], tokens)
                plgpu.wgmma(up_acc, refs.weights_smem.at[up_slot], tokens)
                return carry

            drain_ring(
                work.slots,
                index * work.unit_steps,
                work.unit_steps,
                end,
                copy=copy,
                consume=consume,
                init=(),
                wgmmas_in_flight=2,
                at_once=2,
            )
            return gate_acc[...], up_acc[...]

        accumulator = plgpu.ACC((ROWS, work.N), jnp.float32)
        gate, up = pl.run_scoped(multiply, accumulator, accumulator)
        weights = columns.routing_weights(refs.routing, refs.tables, tile)
        hidden = gate / (1 + jnp.exp(-gate)) * up * weights  # [ROWS, N]
        _store_hidden(work, refs, tile, block, hidden)
        return ()

    lax.fori_loop(0, work.units_of(program, num_tiles), unit_body, ())
    plgpu.wait_smem_to_gmem(0)


def _store_hidden(work: Work, refs: Refs, tile, block, hidden) -> None:
    """Stores hidden [ROWS, N] as two bf16 numbers, 16 bits of mantissa between them."""
    hi = hidden.astype(jnp.bfloat16)
    lo = (hidden - hi.astype(jnp.float32)).astype(jnp.bfloat16)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last unit's may still be read
    refs.hidden_smem.at[pl.ds(0, work.N)].transpose((1, 0))[...] = hi
    refs.hidden_smem.at[pl.ds(work.N, work.N)].transpose((1, 0))[...] = lo
    plgpu.commit_smem()
    at = pl.ds(tile * (2 * work.N), 2 * work.N), pl.ds(block * ROWS, ROWS)
    plgpu.copy_smem_to_gmem(refs.hidden_smem, refs.hidden.at[at])


def down_phase(work: Work, columns, refs: Refs, program, num_tiles, first) -> None:
    """partials[split, t] = sum over t's experts of down_e[:, split] hidden[t, e, split].

    Args:
      first: the ring's number of this phase's first step. The ring is filled with its weights;
        hidden may be copied from here on.
    """
    steps = work.items_of(program) * num_tiles
    lead = work.slots - work.column_slots

    def copy(step, slot):
        step = step - first

        @pl.when(step < steps)
        def _():
            copy_down(work, columns, refs, program, num_tiles, step, slot)

        @pl.when(step - lead < steps)
        def _():
            copy_hidden(work, refs, program, num_tiles, step - lead)

    for step in range(work.column_slots):
        pl.when(step < steps)(
            functools.partial(copy_hidden, work, refs, program, num_tiles, jnp.int32(step))
        )
    end = first + steps + lead

    def item_body(index, _):
        first_of_item = first + index * num_tiles

        def consume(step, slot, carry):
            slots = slot if isinstance(slot, list) else [slot]
            products = _multiply_down(work, refs, step - first, slots)
            for ahead, product in enumerate(products):
                tile = step - first_of_item + ahead
                carry = columns.add(refs.sums, carry, refs.routing, refs.tables, tile, product)
            return carry

        drain = functools.partial(drain_ring, work.slots, end=end, copy=copy, consume=consume)
        carry = columns.zero(refs.sums)
        # A tile's product is awaited before it is added, so several are computed at once where that
        # wait would show.
        at_once = min(columns.at_once, work.column_slots)
        together = jnp.int32(0)
        if at_once > 1:
            few = num_tiles <= columns.at_once_up_to
            together = jnp.where(few, _div(num_tiles, at_once) * at_once, 0)
            carry = drain(first=first_of_item, count=together, init=carry, at_once=at_once)
        carry = drain(first=first_of_item + together, count=num_tiles - together, init=carry)
        block, split = work.item(program, index)
        columns.write(refs.sums, carry, refs.partials.at[split, :, pl.ds(block * ROWS, ROWS)])
        return ()

    lax.fori_loop(0, work.items_of(program), item_body, ())


def _multiply_down(work: Work, refs: Refs, step, slots) -> list[jax.Array]:
    """Of `step` and the next ones, each in its slot, [ROWS, N]: weights times (hi + lo)."""
    column_slots = [
        lax.rem(step + ahead, jnp.int32(work.column_slots)) for ahead in range(len(slots))
    ]
    for slot, column_slot in zip(slots, column_slots, strict=True):
        plgpu.barrier_wait(refs.down_arrived.at[slot])
        plgpu.barrier_wait(refs.hidden_arrived.at[column_slot])

    def multiply(*accumulators):
        for slot, column_slot, accumulator in zip(slots, column_slots, accumulators, strict=True):
            hidden = refs.columns_smem.at[column_slot].transpose((1, 0))  # [columns, 2N]
            plgpu.wgmma(accumulator, refs.weights_smem.at[slot], hidden)
        return [accumulator[...] for accumulator in accumulators]

    accumulator = plgpu.ACC((ROWS, 2 * work.N), jnp.float32)
    both = pl.run_scoped(multiply, *[accumulator] * len(slots))
    return [hi_lo[:, : work.N] + hi_lo[:, work.N :] for hi_lo in both]


def run_gate_up_alone(work: Work, columns, refs: Refs) -> None:
    """The first phase as a whole kernel."""
    program = lax.axis_index("program")
    num_tiles = columns.find_tiles(refs.routing, refs.tables)
    end = work.units_of(program, num_tiles) * work.unit_steps
    copy = functools.partial(copy_gate_up, work, columns, refs, program)
    fill_ring(work.slots, end, copy)
    gate_up_phase(work, columns, refs, program, num_tiles, end, copy)


def run_down_alone(work: Work, columns, refs: Refs) -> None:
    """The second phase as a whole kernel."""
    program = lax.axis_index("program")
    num_tiles = columns.find_tiles(refs.routing, refs.tables)
    columns.find_tokens(refs.routing, refs.tables)
    copy = functools.partial(copy_down, work, columns, refs, program, num_tiles)
    fill_ring(work.slots, work.items_of(program) * num_tiles, copy)
    down_phase(work, columns, refs, program, num_tiles, jnp.int32(0))


def run_both(work: Work, columns, refs: Refs, barrier) -> None:
    """Both phases in one kernel and one ring; `barrier(program)` waits for the whole grid."""
    program = lax.axis_index("program")
    num_tiles = columns.find_tiles(refs.routing, refs.tables)
    first_down = work.units_of(program, num_tiles) * work.unit_steps
    end = first_down + work.items_of(program) * num_tiles

    def copy_weights(step, slot):
        is_down = step >= first_down

        @pl.when(is_down)
        def _():
            copy_down(work, columns, refs, program, num_tiles, step - first_down, slot)

        @pl.when(jnp.logical_not(is_down))
        def _():
            copy_gate_up(work, columns, refs, program, step, slot)

    fill_ring(work.slots, end, copy_weights)
    columns.find_tokens(refs.routing, refs.tables)
    gate_up_phase(work, columns, refs, program, num_tiles, end, copy_weights)
    barrier(program)
    down_phase(work, columns, refs, program, num_tiles, first_down)
