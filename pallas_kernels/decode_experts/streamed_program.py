"""One program of the streamed layout, from the first to the last phase.

Interpret mode has no barrier of the whole grid: there each phase is a kernel of its own, and phase
0 is gather_rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.decode_experts.gather_share import gather_share
from pallas_kernels.decode_experts.streamed_phases import (
    NO_END,
    Refs,
    Work,
    copy_down,
    copy_gate_up,
    copy_hidden,
    copy_rows,
    down_phase,
    gate_up_phase,
)
from pallas_kernels.decode_experts.streamed_shares import Share
from pallas_kernels.mosaic import fill_ring

# Slots that are filled before the first barrier. All of them would keep the memory busy for longer
# than a barrier takes, and the barrier has to wait in the same queues.
_FILLED_EARLY = 2


class Stream(NamedTuple):
    """The ring steps of one share: what its copies are, and which step of the ring is its first."""

    share: Share
    weights: Callable
    tokens: Callable
    first_step: Any = 0

    def copy(self, work: Work, refs: Refs, step, slot, *, weights=True, tokens=True) -> None:
        """Starts a step's copies, if there is such a step; learns what unit a first one is of."""
        step -= self.first_step
        index = lax.div(jnp.int32(step), jnp.int32(self.share.steps))
        step -= index * self.share.steps
        if weights:
            is_new = (step == 0) & (index < self.share.count())
            pl.when(is_new)(lambda: self.share.learn(index))

        @pl.when(index < self.share.count())
        def _():
            if weights:
                self.weights(work, refs, self.share.unit(index), step, slot)
            if tokens:
                self.tokens(work, refs, self.share.unit(index), step, slot)


def run_gate_up_alone(work: Work, refs: Refs) -> None:
    """Phase 1 as a whole kernel."""
    units, _ = work.shares(refs, interpret=True)
    units.prepare()
    copy = functools.partial(Stream(units, copy_gate_up, copy_rows).copy, work, refs)
    fill_ring(work.slots, NO_END, copy)
    gate_up_phase(work, refs, units, copy)


def run_down_alone(work: Work, refs: Refs) -> None:
    """Phase 2 as a whole kernel."""
    _, items = work.shares(refs, interpret=True)
    items.prepare()
    copy = functools.partial(Stream(items, copy_down, copy_hidden).copy, work, refs)
    fill_ring(work.slots, NO_END, copy)
    down_phase(work, refs, items, jnp.int32(0), copy)


def run_all(work: Work, refs: Refs, barrier) -> None:
    """All phases in one kernel and one ring; `barrier(program)` waits for the whole grid."""
    program = lax.axis_index("program")
    finish_gather = gather_share(
        work.tiles, refs.tables, program, work.num_programs,
        refs.x, refs.weights, refs.rows, refs.weight_of, refs.row_of,
    )  # fmt: skip
    units, items = work.shares(refs, interpret=False)
    units.prepare()
    items.prepare()
    unit_stream = Stream(units, copy_gate_up, copy_rows)

    def item_stream():
        return Stream(items, copy_down, copy_hidden, units.count() * units.steps)

    def copy(step, slot, **which):
        """Of units as long as there are some; of items only what does not wait for hidden."""

        @pl.when(step < units.count() * units.steps)
        def _():
            unit_stream.copy(work, refs, step, slot, **which)

        # By now it may be known that there is no such unit.
        @pl.when(step >= units.count() * units.steps)
        def _():
            item_stream().copy(work, refs, step, slot, tokens=False)

    def copy_rows_of(step, slot):
        @pl.when(step < units.count() * units.steps)
        def _():
            unit_stream.copy(work, refs, step, slot, weights=False)

    # Weights wait for nothing; rows and hidden are there once all programs have passed a barrier.
    early = min(_FILLED_EARLY, work.slots)
    fill_ring(early, NO_END, functools.partial(copy, tokens=False))
    finish_gather()
    barrier(program)
    fill_ring(early, NO_END, copy_rows_of)
    fill_ring(work.slots, NO_END, copy, first=early)
    gate_up_phase(work, refs, units, copy)
    barrier(program)

    stream = item_stream()
    for ahead in range(work.slots):
        step = stream.first_step + ahead
        slot = lax.rem(step, jnp.int32(work.slots))
        stream.copy(work, refs, step, slot, weights=False)
    down_phase(work, refs, items, stream.first_step, functools.partial(stream.copy, work, refs))
