"""How one call of the router is cut, and the memory that its phases share.

Every phase is a function of one program's work. It ends with results in global memory and begins by
reading what other programs left there, so that each can also be a launch of its own, as interpret
mode needs it.

Shared memory written here is read by plain loads of the same warpgroup, which Pallas's own barrier
after each store is enough for; commit_smem is for the copy engine and the tensor cores.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

ROWS = 64  # experts of a unit: the rows that one wgmma takes
COLUMNS = 64  # columns of a piece: 128 bytes of bf16, the swizzle's width
RANKS = 16  # rows of the tile that choices are read from
_MOST_SPLITS = 32


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def _div(a, b):
    return lax.div(jnp.int32(a), jnp.int32(b))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """How one call is cut. Only `pieces` sets an order of sums, and it depends on H alone.

    Attributes:
      num_programs: programs in the grid; token t belongs to program t % num_programs.
    """

    T: int
    H: int
    E: int
    K: int
    norm_topk_prob: bool
    norm_eps: float | None
    num_programs: int

    @property
    def N(self) -> int:
        """Columns of the product: the tokens, and zeros."""
        return round_up(self.T, 8)

    @property
    def lanes(self) -> int:
        """E, rounded up to whole warpgroups."""
        return round_up(self.E, 128)

    @property
    def pieces(self) -> int:
        """Pieces of COLUMNS columns in a split of H; the last split may have fewer."""
        return -(-(self.H // COLUMNS) // _MOST_SPLITS)

    @property
    def splits(self) -> int:
        return -(-(self.H // COLUMNS) // self.pieces)

    @property
    def blocks(self) -> int:
        return -(-self.E // ROWS)

    @property
    def units(self) -> int:
        """Of the product: each is one split of H for ROWS experts."""
        return self.splits * self.blocks

    @property
    def units_a_program(self) -> int:
        return -(-self.units // self.num_programs)

    @property
    def slots(self) -> int:
        return self.units_a_program * self.pieces

    @property
    def slot_bytes(self) -> int:
        return 2 * COLUMNS * (ROWS + self.N)

    def unit(self, program, index):
        """(whether there is one, its split, its block) of a program's index-th unit."""
        unit = program + index * self.num_programs
        return unit < self.units, _div(unit, self.blocks), lax.rem(unit, jnp.int32(self.blocks))

    def has_piece(self, split, piece):
        return split * self.pieces + piece < self.H // COLUMNS

    def share(self, program, count: int):
        """How many of `count` things, dealt out in turns, are this program's."""
        return _div(count + self.num_programs - 1 - program, self.num_programs)


@dataclasses.dataclass(frozen=True)
class Refs:
    """What the phases work on; None where a launch of its own does not need it.

    Attributes:
      x: [N, H] bf16, or [T, H] on a GPU, whose copy engine fills rows past the end with zeros.
      gate: [E, H] bf16, likewise [blocks * ROWS, H].
      norm_weight: [H] bf16.
      normed: [T, H] bf16 (in interpret mode [N, H]).
      partials: [splits, N, lanes] float32, the product's sums over each split of H.
      logits: [T, E] float32.
      ids: [T, K] int32.
      weights: [T, K] float32.
    """

    x: Any = None
    gate: Any = None
    norm_weight: Any = None
    normed: Any = None
    partials: Any = None
    logits: Any = None
    ids: Any = None
    weights: Any = None
    scratch: dict[str, Any] = dataclasses.field(default_factory=dict)
