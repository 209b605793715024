"""Whose columns an expert's products have: tiles of tokens, found by each program from the ids.

The tiles are grouping.py's: N columns of one expert each, ordered by expert.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_experts.count_ids import LANES, count_ids
from pallas_kernels.decode_experts.grouping import tile_capacity
from pallas_kernels.mosaic import count_up

_COPIED_IDS = 256  # a TMA box has at most 256 elements a side
# Ids are copied 16 bytes at a time.
_IDS_MULTIPLE = 4


def pad_ids(expert_ids: jax.Array) -> jax.Array:
    """[T, K] to [T * K], filled up to a multiple of 4 with padding: what Tiles.find takes."""
    return jnp.pad(
        expert_ids.reshape(-1), (0, -expert_ids.size % _IDS_MULTIPLE), constant_values=-1
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _div(a, b):
    return lax.div(jnp.int32(a), jnp.int32(b))


def one_a_lane(length: int):
    """The layout of a vector whose elements take the 128 lanes by turns."""
    return plgpu.Layout.WG_STRIDED((length,), 1)


def lanes_of(length: int) -> jax.Array:
    """[length]: each element's index."""
    return plgpu.broadcasted_iota(jnp.int32, (length,), 0, layout=one_a_lane(length))


def _sum_of_each(count: int, like: jax.Array, term: Callable[[Any], jax.Array]) -> jax.Array:
    """The sum of term(index), an array like `like`, for each index below `count`, a multiple of 4.

    Four sums by turns, for an addition waits for the one before.
    """

    def add(index, sums):
        return [total + term(index * 4 + turn) for turn, total in enumerate(sums)]

    return sum(count_up(count // 4, 4, add, [jnp.zeros_like(like)] * 4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tiles of a batch, and the shared memory in which a program keeps what it knows of them.

    Attributes:
      N: columns of a tile.
    """

    T: int
    K: int
    E: int
    N: int

    @property
    def assignments(self) -> int:
        return self.T * self.K

    @property
    def most(self) -> int:
        """The most tiles that any routing fills."""
        return tile_capacity(self.T, self.K, self.E, self.N)

    @property
    def rows(self) -> int:
        """Rows of all tiles, used or not."""
        return self.most * self.N

    def scratch_types(self) -> dict[str, Any]:
        experts = plgpu.SMEM((_round_up(self.E, LANES),), jnp.int32)
        return {
            "ids": plgpu.SMEM((_round_up(self.assignments, LANES),), jnp.int32),
            "ids_arrived": plgpu.Barrier(num_arrivals=-(-self.assignments // _COPIED_IDS)),
            "count_of": experts,  # tokens of each expert
            "tiles_of": experts,
            "first_of": experts,  # each expert's first tile
        }

    def find(self, ids_gmem, scratch, interpret) -> jax.Array:
        """Fills all tables; returns the number of tiles.

        Args:
          ids_gmem: from pad_ids.
          interpret: as in decode_experts.
        """
        for start in range(0, self.assignments, _COPIED_IDS):
            part = pl.ds(start, min(_COPIED_IDS, ids_gmem.shape[0] - start))
            plgpu.copy_gmem_to_smem(
                ids_gmem.at[part], scratch["ids"].at[part], scratch["ids_arrived"]
            )
        count_of, tiles_of = scratch["count_of"], scratch["tiles_of"]
        count_of[...] = jnp.zeros(count_of.shape, count_of.dtype)
        plgpu.barrier_wait(scratch["ids_arrived"])
        count_ids(scratch["ids"], self.assignments, self.E, count_of, interpret)
        counts = plgpu.load(count_of, layout=one_a_lane(count_of.shape[0]))
        tiles_of[...] = _div(counts + (self.N - 1), self.N)

        # An expert a lane: its first tile comes after all those of lower experts.
        experts = lanes_of(tiles_of.shape[0])
        scratch["first_of"][...] = _sum_of_each(
            _round_up(self.E, 4), experts, lambda e: jnp.where(e < experts, tiles_of[e], 0)
        )
        return scratch["first_of"][self.E - 1] + tiles_of[self.E - 1]

    def store_table(self, scratch, num_tiles, program, num_programs: int, table) -> None:
        """Writes Gathered's table: this program's share of the experts and of the unused tiles."""

        @pl.when(program == 0)
        def _():
            table[2 * self.most] = num_tiles

        def store_expert(index, _):
            expert = program + index * num_programs

            @pl.when(expert < self.E)
            def _():
                first = scratch["first_of"][expert]

                def store(tile, _):
                    table[2 * tile] = expert
                    table[2 * tile + 1] = self.owned(scratch, expert, tile)

                lax.fori_loop(first, first + scratch["tiles_of"][expert], store, None)

        def store_unused(index, _):
            tile = num_tiles + program + index * num_programs

            @pl.when(tile < self.most)
            def _():
                table[2 * tile] = jnp.int32(-1)
                table[2 * tile + 1] = jnp.int32(0)

        lax.fori_loop(0, -(-self.E // num_programs), store_expert, None)
        lax.fori_loop(0, -(-self.most // num_programs), store_unused, None)

    def owned(self, scratch, expert, tile) -> jax.Array:
        """How many columns of an expert's tile have an owner."""
        before = (tile - scratch["first_of"][expert]) * self.N
        return jnp.minimum(scratch["count_of"][expert] - before, self.N)
