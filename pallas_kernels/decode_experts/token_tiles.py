"""Which tokens are the columns of an expert's products: what expert_major's blocks ask.

Two kinds of tiles answer, N columns with one expert each:

    gathered       each expert's tokens side by side, found by a launch of its own     (gather.py)
    whole batch    all tokens, for every expert: at most 8, and nothing is gathered

A column whose token chose the tile's expert is valid; the others are padding. Padding columns are
computed but not stored; they would be most of the store traffic.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.decode_experts.swiglu_epilogue import load_weights, spread_weights
from pallas_kernels.mosaic.warpgroup import equal_bits

# Each block looks at all ids, in code without a loop.
_MAX_ASSIGNMENTS_UNROLLED = 128


class Tile(NamedTuple):
    """One tile, in a kernel.

    Attributes:
      expert: its expert; -1 for a tile that is not used.
      first_row: of its N rows in the x operand; a multiple of 8.
      valid: which columns are valid, as the tiles that it is one of want to know it.
    """

    expert: jax.Array
    first_row: jax.Array
    valid: Any


class TokenTiles(Protocol):
    """A batch's tiles.

    Attributes:
      N: columns of a tile, block_n.
      num_columns: the first ones, which may be valid; N unless fewer tokens are known to be there.
      num_tiles: used or not.
      num_outputs: rows of outputs.
      operands: what `lookup`, `load_weights` and the pipeline read in a kernel: the table of tiles,
        the routing weights, float32, and rows of x.
      row_of: [T, K] int32, the row of outputs of assignment (t, k); -1 where it is padding.
    """

    N: int
    num_columns: int
    num_tiles: int
    num_outputs: int

    @property
    def operands(self) -> tuple[jax.Array, jax.Array, jax.Array]: ...

    @property
    def row_of(self) -> jax.Array: ...

    def num_used(self, table: Any) -> jax.Array | int:
        """How many tiles come first; those after them have no expert."""
        ...

    def lookup(self, table: Any, index: jax.Array) -> Tile:
        """The index-th tile; `table` is the first operand in global memory."""
        ...

    def for_each_valid(self, tile: Tile, do: Callable[[Any, Any], None]) -> None:
        """Calls do(column, row of outputs) for each valid column."""
        ...

    def valid_columns(self, tile: Tile) -> list[jax.Array]:
        """Of each of num_columns columns whether it is valid."""
        ...

    def load_weights(self, weights: Any, tile: Tile, layout: Any) -> jax.Array:
        """[N]: the columns' routing weights in registers of that layout; padding's may be any."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeBatchTiles:
    """At most 8 tokens: the whole batch is every expert's tile, so nothing has to be gathered.

    Column t of each product is token t, whether it chose that expert or not, because the tensor
    cores take 8 columns in any case. An expert's tile is that of the first assignment that chose
    it, its leader. The blocks of the others have nothing to do, and find that out from the ids:

        ids [[4, 7], [2, 4], [7, 5]]    assignment  0  1  2  3  4  5
                                        leader      0  1  2  0  1  5
                                        expert      4  7  2  -  -  5

    There is a tile for each assignment; an output's row is its assignment.

    Attributes:
      x: [T, H] bf16.
      expert_ids: [T, K] int32; ids outside [0, E) are padding.
      expert_weights: [T, K] float32; padding's may be anything.
      E: experts.
    """

    N: ClassVar[int] = 8

    x: jax.Array
    expert_ids: jax.Array
    expert_weights: jax.Array
    E: int

    @classmethod
    def fit(cls, T: int, K: int) -> bool:
        """Whether T tokens with K experts each can be one tile."""
        return T <= cls.N and T * K <= _MAX_ASSIGNMENTS_UNROLLED

    @property
    def num_columns(self) -> int:
        return self.expert_ids.shape[0]

    @property
    def num_tiles(self) -> int:
        return self.expert_ids.size

    @property
    def num_outputs(self) -> int:
        return self.expert_ids.size

    @property
    def operands(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.expert_ids.reshape(-1), self.expert_weights.reshape(-1), self.x

    @property
    def row_of(self) -> jax.Array:
        ids = self.expert_ids
        rows = jnp.arange(ids.size, dtype=jnp.int32).reshape(ids.shape)
        return jnp.where((ids >= 0) & (ids < self.E), rows, -1)

    def num_used(self, ids: Any) -> int:
        del ids
        return self.num_tiles

    def lookup(self, ids: Any, index: jax.Array) -> Tile:
        """The tile of assignment `index`, if it is the leader.

        Where a token names an expert several times, each time is a tile of its own, as it is a row
        of its own when gathered: the n-th of one token shares a tile with the n-th of another.
        """
        T, K = self.expert_ids.shape
        expert, none = ids[index], jnp.int32(-1)
        same = equal_bits(ids, T * K, expert)
        first_of_token = lax.div(index, jnp.int32(K)) * K
        before = [
            word & _below(index - at) & ~_below(first_of_token - at) for at, word in _places(same)
        ]
        nth = functools.reduce(operator.add, map(_count, before))
        of_tokens = [
            [word & _bits(token * K - at, token * K + K - at) for at, word in _places(same)]
            for token in range(T)
        ]
        # Seldom more than none.
        of_tokens = lax.fori_loop(
            0, nth, lambda _, found: list(map(_without_lowest, found)), of_tokens
        )

        leader, chosen_by = none, []
        for words in of_tokens:
            chosen = none
            for at, word in reversed(list(_places(words))):
                chosen = jnp.where(word == 0, chosen, at + 31 - lax.clz(word & -word))
            leader = jnp.where(leader < 0, chosen, leader)
            chosen_by.append(chosen)

        leads = (expert >= 0) & (expert < self.E) & (leader == index)
        return Tile(
            expert=jnp.where(leads, expert, -1),
            # A number that is known only as the kernel runs. Columns from T on are then outside of
            # x, where the copy engine reads zeros, and no error of the compiler's.
            first_row=index * 0,
            valid=chosen_by,
        )

    def for_each_valid(self, tile: Tile, do: Callable[[Any, Any], None]) -> None:
        for column, row in enumerate(tile.valid):
            pl.when(row >= 0)(functools.partial(do, column, row))

    def valid_columns(self, tile: Tile) -> list[jax.Array]:
        return [row >= 0 for row in tile.valid]

    def load_weights(self, weights: Any, tile: Tile, layout: Any) -> jax.Array:
        of_columns = [weights[jnp.maximum(row, 0)] for row in tile.valid]
        return spread_weights(of_columns, self.N, layout)


def _places(words: list) -> Iterator[tuple[int, Any]]:
    """Each word of bits, and which bit its lowest one is."""
    return zip(range(0, 32 * len(words), 32), words, strict=True)


def _bits(first: int, end: int) -> int:
    """An int32 with bits first .. end - 1 set; there are 32."""
    bits = (1 << min(max(end, 0), 32)) - (1 << min(max(first, 0), 32))
    return bits - (1 << 32) if bits >> 31 else bits


def _below(end: jax.Array) -> jax.Array:
    """An int32 with the bits below the end-th set."""
    bits = lax.shift_left(jnp.int32(1), jnp.clip(end, 0, 31)) - 1
    return jnp.where(end >= 32, -1, bits)


def _count(word: jax.Array) -> jax.Array:
    """How many bits are set."""
    word -= lax.shift_right_logical(word, 1) & 0x55555555
    word = (word & 0x33333333) + (lax.shift_right_logical(word, 2) & 0x33333333)
    word = (word + lax.shift_right_logical(word, 4)) & 0x0F0F0F0F
    return lax.shift_right_logical(word * 0x01010101, 24)


def _without_lowest(words: list) -> list:
    """The words without the lowest of the bits that are set."""
    found, left = jnp.bool_(False), []
    for word in words:
        left.append(jnp.where(found, word, word & (word - 1)))
        found |= word != 0
    return left


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatheredTiles:
    """Tiles whose rows of x lie side by side, P of them; padding rows may hold anything.

    Attributes:
      rows: [P, H] bf16, a token's x for each of its assignments.
      weight_of: [P] float32, the routing weight of each row.
      row_of: [T, K] int32, the row of assignment (t, k); -1 where it is padding.
      table: [2 * P / N + 1] int32: of each tile its expert, -1 where it is unused, and how many of
        its rows, the first ones, are valid; at the end, how many tiles are used.
      N: rows of a tile, block_n (static).
    """

    rows: jax.Array
    weight_of: jax.Array
    row_of: jax.Array
    table: jax.Array
    N: int = dataclasses.field(metadata={"static": True})

    @property
    def num_columns(self) -> int:
        return self.N

    @property
    def num_tiles(self) -> int:
        return self.rows.shape[0] // self.N

    @property
    def num_outputs(self) -> int:
        return self.rows.shape[0]

    @property
    def operands(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.table, self.weight_of, self.rows

    def num_used(self, table: Any) -> jax.Array:
        return table[2 * self.num_tiles]

    def lookup(self, table: Any, index: jax.Array) -> Tile:
        expert, valid = table[2 * index], table[2 * index + 1]
        return Tile(expert, first_row=index * self.N, valid=valid)

    def for_each_valid(self, tile: Tile, do: Callable[[Any, Any], None]) -> None:
        lax.fori_loop(0, tile.valid, lambda column, _: do(column, tile.first_row + column), None)

    def valid_columns(self, tile: Tile) -> list[jax.Array]:
        return [column < tile.valid for column in range(self.N)]

    def load_weights(self, weights: Any, tile: Tile, layout: Any) -> jax.Array:
        return load_weights(weights.at[pl.ds(tile.first_row, self.N)], layout)
