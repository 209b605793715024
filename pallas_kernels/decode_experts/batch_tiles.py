"""At most 8 tokens: the whole batch is every expert's tile, so nothing has to be gathered.

Column t of each product is token t, whether it chose that expert or not: the tensor cores take 8
columns in any case. An expert's tile is that of the first assignment that chose it, its leader.
The programs of the others have nothing to do, and find that out from the ids alone:

    ids [[4, 7], [2, 4], [7, 5]]    assignment  0  1  2  3  4  5
                                    leader      0  1  2  0  1  5
                                    expert      4  7  2  -  -  5
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.decode_experts import gated
from pallas_kernels.decode_experts.token_tiles import Tile

# Each program looks at all ids, in code without a loop.
_MOST_ASSIGNMENTS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchTiles:
    """Such a batch as TokenTiles, a tile for each assignment; an output's row is its assignment.

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
        return T <= cls.N and T * K <= _MOST_ASSIGNMENTS

    @property
    def count(self) -> int:
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

    def used(self, ids: Any) -> int:
        del ids
        return self.count

    def find(self, ids: Any, index: jax.Array) -> Tile:
        """The tile of assignment `index`, if it is the leader.

        Where a token names an expert several times, each time is a tile of its own, as it is a row
        of its own when gathered: the n-th of one token shares a tile with the n-th of another.
        """
        T, K = self.expert_ids.shape
        expert, none = ids[index], jnp.int32(-1)
        first_of_token = lax.div(index, jnp.int32(K)) * K
        nth = jnp.int32(0)
        for other in range(K):
            other += first_of_token
            nth += jnp.where((other < index) & (ids[other] == expert), 1, 0)

        leader, chosen_by = none, []
        for token in range(T):
            seen, chosen = jnp.int32(0), none
            for assignment in range(token * K, token * K + K):
                same = ids[assignment] == expert
                chosen = jnp.where(same & (seen == nth), assignment, chosen)
                seen += jnp.where(same, 1, 0)
            leader = jnp.where(leader < 0, chosen, leader)
            chosen_by.append(chosen)

        leads = (expert >= 0) & (expert < self.E) & (leader == index)
        return Tile(
            expert=jnp.where(leads, expert, -1),
            # A number that is known only as the kernel runs: columns from T on are then outside of
            # x, where the copy engine reads zeros, and no error of the compiler's.
            first_row=index * 0,
            owners=chosen_by,
        )

    def for_each_owned(self, tile: Tile, do: Callable[[Any, Any], None]) -> None:
        for column, row in enumerate(tile.owners):
            pl.when(row >= 0)(functools.partial(do, column, row))

    def load_weights(self, weights: Any, tile: Tile) -> jax.Array:
        return gated.spread_weights([weights[jnp.maximum(row, 0)] for row in tile.owners], self.N)
