"""Which units of a phase a program does: its first ones by its own number, then the next free one.

Cores do not get equal shares of the memory's bandwidth, and no number of units divides evenly. So
units are dealt out one by one, to whoever comes next, by a counter in global memory. Neighbours in
time are neighbours in memory, too: measured, that is worth 4% against a run of units for each
program. Who does a unit changes no bit of it.

The answer takes microseconds while the memory is busy. So a program asks `lead` units ahead, as it
begins to work on one, and looks at the answer when it has done that one; its first `lead` units are
known without asking. Whoever gets the last number of all sets the counter to zero for the next
launch: one number is taken for each unit, so that is known too.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import grid
from pallas_kernels.decode_experts.tiles import Tiles, Unit

PHASES = 2
# Units of one program that are known at once: those in the ring and those asked for.
_KNOWN = 32
_NOT_YET_KNOWN = 1 << 20


def scratch_types() -> dict[str, Any]:
    """The shared memory in which a program keeps its next units, by phase."""
    return {
        "known": plgpu.SMEM((PHASES, _KNOWN, len(Unit._fields)), jnp.int32),
        "count": plgpu.SMEM((PHASES,), jnp.int32),
        "numbers": plgpu.SMEM((PHASES * _KNOWN,), jnp.int32),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """One program's units of one phase; its j-th unit takes ring steps j * steps and following.

    Attributes:
      phase: whose counter it is.
      tiles: the tiles of tokens.
      num_tiles: how many there are.
      blocks: units of a tile.
      steps: ring steps of a unit.
      slots: slots in the ring: so many steps are the copies ahead of the work.
      num_programs: programs in the grid.
      tables, scratch: shared memory of `tiles`, and of scratch_types.
      counter: int32 in global memory; None deals out all units by the programs' numbers.
    """

    phase: int
    tiles: Tiles
    num_tiles: Any
    blocks: int
    steps: int
    slots: int
    num_programs: int
    tables: Any
    scratch: Any
    counter: Any

    @property
    def lead(self) -> int:
        return 1 + -(-self.slots // self.steps)

    def prepare(self) -> None:
        """To be called before all else."""
        self.scratch["count"][self.phase] = jnp.int32(_NOT_YET_KNOWN)

    def count(self) -> jax.Array:
        """The number of the program's units, or something larger as long as it is not known."""
        return self.scratch["count"][self.phase]

    def unit(self, index) -> Unit:
        """The index-th one, which has been learned."""
        known = self.scratch["known"]
        index &= _KNOWN - 1
        return Unit(*(known[self.phase, index, field] for field in range(len(Unit._fields))))

    def learn(self, index) -> None:
        """Finds out about the index-th unit, or that there is none."""
        unit = lax.axis_index("program") + index * self.num_programs
        if self.counter is not None:
            plgpu.commit_smem()  # what one lane has kept, all lanes read
            number = self.scratch["numbers"][self._place(index)]
            unit = jnp.where(index < self.lead, unit, self.lead * self.num_programs + number)
        exists = unit < self.num_tiles * self.blocks

        @pl.when(jnp.logical_not(exists))
        def _():
            self.scratch["count"][self.phase] = index

        @pl.when(exists)
        def _():
            for field, value in enumerate(self.tiles.unit(self.tables, unit, self.blocks)):
                self.scratch["known"][self.phase, index & (_KNOWN - 1), field] = value

    def ask(self):
        """Asks for a unit, `lead` after the one that is begun; the answer is for `keep`."""
        if self.counter is None:
            return None
        return grid.take_number(self.counter, 1 + self.phase)

    def keep(self, index, answer) -> None:
        """Keeps the answer about the index-th unit for `learn`; waits for it."""
        if answer is not None:
            last = self.num_tiles * self.blocks - 1
            grid.store_number(
                answer, last, self.counter, 1 + self.phase,
                self.scratch["numbers"], self._place(index),
            )  # fmt: skip

    def for_each(self, body) -> None:
        """body(index) for each of the program's units in turn; the first one has been learned."""

        def one(carry):
            index, _ = carry
            answer = self.ask()
            body(index)
            self.keep(index + self.lead, answer)
            return index + 1, index + 1 < self.count()

        lax.while_loop(lambda carry: carry[1], one, (jnp.int32(0), self.count() > 0))

    def _place(self, index):
        return self.phase * _KNOWN + (index & (_KNOWN - 1))
