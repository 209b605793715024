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
from pallas_kernels.mosaic import drain_ring, fill_ring

# How wgmma operands lie in shared memory: 8 x 64 tiles of bf16 under the 128-byte swizzle.
OPERAND = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


FEW_TILES = 16


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
      columns: columns of weights in a ring slot.
      halves: an item of the down phase has halves * ROWS output neurons.
      slots: slots in the ring.
      num_programs: programs in the grid.
    """

    H: int
    I: int
    N: int
    columns: int
    halves: int
    slots: int
    num_programs: int

    @property
    def unit_steps(self) -> int:
        return self.H // self.columns

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
        return self.H // (self.halves * ROWS) * self.splits

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
      gate_up: [2 * E, I, H] bf16.
      down: [E * H / ROWS, ROWS, I] bf16.
      hidden: [2 * N * tiles, I] bf16: of each tile N rows of hi and N rows of lo.
      partials: [splits, rows, H] float32.
      tables: shared memory that says which expert each tile has, and for which tokens.
      sums: shared memory for the down phase's sums, if they are kept there.
      weights_smem: [slots, 2, ROWS, columns], the ring.
      columns_smem: [slots, 2 * N, columns], its other operand.
      hidden_smem: [2 * N, ROWS], on the way from registers to `hidden`.
      gate_up_arrived, down_arrived: a barrier for each slot.
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


def copy_gate_up(work: Work, columns, refs: Refs, program, step, slot) -> None:
    """Starts the copies of step `step` of the program's gate/up units."""
    index, step_of_unit = _divmod(step, work.unit_steps)
    tile, block = work.unit(program, index)
    at = pl.ds(step_of_unit * work.columns, work.columns)
    expert = columns.expert(refs.tables, tile)
    arrived = refs.gate_up_arrived.at[slot]
    plgpu.copy_gmem_to_smem(
        refs.gate_up.at[pl.ds(2 * expert, 2), pl.ds(block * ROWS, ROWS), at],
        refs.weights_smem.at[slot],
        arrived,
    )
    plgpu.copy_gmem_to_smem(
        refs.rows.at[pl.ds(columns.first_row(tile), work.N), at],
        refs.columns_smem.at[slot, pl.ds(0, work.N)],
        arrived,
    )


def copy_down(work: Work, columns, refs: Refs, program, num_tiles, step, slot) -> None:
    """Starts the copy of the weights of step `step` of the program's down items."""
    index, tile = _divmod(step, num_tiles)
    block, split = work.item(program, index)
    expert = columns.expert(refs.tables, tile)
    first = expert * (work.H // ROWS) + block * work.halves
    plgpu.copy_gmem_to_smem(
        refs.down.at[pl.ds(first, work.halves), :, pl.ds(split * work.columns, work.columns)],
        refs.weights_smem.at[slot, pl.ds(0, work.halves)],
        refs.down_arrived.at[slot],
    )


def copy_hidden(work: Work, refs: Refs, program, num_tiles, step, slot) -> None:
    """Starts the copy of the other operand of that step, which the first phase has written."""
    index, tile = _divmod(step, num_tiles)
    _, split = work.item(program, index)
    at = pl.ds(split * work.columns, work.columns)
    plgpu.copy_gmem_to_smem(
        refs.hidden.at[pl.ds(tile * (2 * work.N), 2 * work.N), at],
        refs.columns_smem.at[slot],
        refs.down_arrived.at[slot],
    )


def gate_up_phase(work: Work, columns, refs: Refs, program, num_tiles, end, copy) -> None:
    """hidden[tile] = weight * silu(gate x) * (up x), unit after unit, from a filled ring.

    Args:
      end, copy: as in drain_ring; steps after this phase's own may follow in the same ring.
    """

    def unit_body(index, _):
        tile, block = work.unit(program, index)

        def multiply(gate_acc, up_acc):
            def consume(_, slot, carry):
                plgpu.barrier_wait(refs.gate_up_arrived.at[slot])
                tokens = refs.columns_smem.at[slot, pl.ds(0, work.N)].transpose(
                    (1, 0)
                )  # [columns, N]
                plgpu.wgmma(gate_acc, refs.weights_smem.at[slot, 0], tokens)
                plgpu.wgmma(up_acc, refs.weights_smem.at[slot, 1], tokens)
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


def down_phase(work: Work, columns, refs: Refs, program, num_tiles, first, end, copy) -> None:
    """partials[split, t] = sum over t's experts of down_e[:, split] hidden[t, e, split].

    Args:
      first: the ring's number of this phase's first step.
      end, copy: as in drain_ring.
    """

    def item_body(index, _):
        first_of_item = first + index * num_tiles

        def consume(step, slot, carry):
            slots = slot if isinstance(slot, list) else [slot]
            products = _multiply_down(work, refs, slots)
            for ahead, product in enumerate(products):
                tile = step - first_of_item + ahead
                carry = columns.add(refs.sums, carry, refs.routing, refs.tables, tile, product)
            return carry

        drain = functools.partial(drain_ring, work.slots, end=end, copy=copy, consume=consume)
        carry = columns.zero(refs.sums, work.halves)
        # All products of an expert are awaited before the next one's are begun. With few experts
        # that is most of what follows the barrier, so they are taken several at once; with many,
        # it is hidden behind the copies, and slots are better refilled one by one.
        at_once = min(columns.at_once, work.slots)
        together = jnp.int32(0)
        if at_once > 1:
            together = jnp.where(num_tiles <= FEW_TILES, _div(num_tiles, at_once) * at_once, 0)
            carry = drain(first=first_of_item, count=together, init=carry, at_once=at_once)
        carry = drain(first=first_of_item + together, count=num_tiles - together, init=carry)
        block, split = work.item(program, index)
        wide = work.halves * ROWS
        columns.write(refs.sums, carry, refs.partials.at[split, :, pl.ds(block * wide, wide)])
        return ()

    lax.fori_loop(0, work.items_of(program), item_body, ())


def _multiply_down(work: Work, refs: Refs, slots) -> list[list[jax.Array]]:
    """Of each slot, [ROWS, N] for each half of its rows: weights times (hi + lo)."""
    N = work.N
    for slot in slots:
        plgpu.barrier_wait(refs.down_arrived.at[slot])

    def multiply(*accumulators):
        for slot, of_slot in zip(slots, _rows_of(accumulators, work.halves), strict=True):
            hidden = refs.columns_smem.at[slot].transpose((1, 0))  # [columns, 2N]
            for half, accumulator in enumerate(of_slot):
                plgpu.wgmma(accumulator, refs.weights_smem.at[slot, half], hidden)
        return [accumulator[...] for accumulator in accumulators]

    accumulator = plgpu.ACC((ROWS, 2 * N), jnp.float32)
    sums = pl.run_scoped(multiply, *[accumulator] * (len(slots) * work.halves))
    return _rows_of([both[:, :N] + both[:, N:] for both in sums], work.halves)


def _rows_of(flat, length: int) -> list:
    return [flat[start : start + length] for start in range(0, len(flat), length)]


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
    end = work.items_of(program) * num_tiles

    def copy(step, slot):
        copy_down(work, columns, refs, program, num_tiles, step, slot)
        copy_hidden(work, refs, program, num_tiles, step, slot)

    fill_ring(work.slots, end, copy)
    down_phase(work, columns, refs, program, num_tiles, jnp.int32(0), end, copy)


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

    def copy_hidden_too(step, slot):
        copy_hidden(work, refs, program, num_tiles, step - first_down, slot)

    def copy_both(step, slot):
        copy_down(work, columns, refs, program, num_tiles, step - first_down, slot)
        copy_hidden_too(step, slot)

    fill_ring(work.slots, end, copy_weights)
    columns.find_tokens(refs.routing, refs.tables)
    gate_up_phase(work, columns, refs, program, num_tiles, end, copy_weights)
    barrier(program)
    for ahead in range(work.slots):
        step = first_down + ahead

        @pl.when(step < end)
        def _(step=step):
            copy_hidden_too(step, lax.rem(step, jnp.int32(work.slots)))

    down_phase(work, columns, refs, program, num_tiles, first_down, end, copy_both)
