"""Whose columns an expert's products have: tiles of tokens, found by each program from the ids.

The tiles are grouping.py's: N columns of one expert each, ordered by expert. A tile's units of work
come block by block, so that tiles of one expert, which read the same weights, are neighbours:

    expert 2 (5 tokens, N = 8)    expert 7 (11 tokens)               expert 9 ...
    unit 0  1  2  3               4     5     6     7     8 ...      12
    tile 0  0  0  0               1     2     1     2     1          3
    block 0 1  2  3               0     0     1     1     2          0
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_experts.grouping import tile_capacity
from pallas_kernels.mosaic import count_up, row_layout

_LANES = 128
_COPIED_IDS = 256  # a TMA box has at most 256 elements a side
# Elements of x that a program holds in registers while it waits for the rest.
_EARLY_ELEMENTS = 16384
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


def _one_a_lane(length: int):
    return plgpu.Layout.WG_STRIDED((length,), 1)


def _lanes(length: int) -> jax.Array:
    """[length]: each element's index."""
    return plgpu.broadcasted_iota(jnp.int32, (length,), 0, layout=_one_a_lane(length))


class Unit(NamedTuple):
    """A tile's block of rows of weights, and how many of the tile's columns have an owner."""

    expert: jax.Array
    tile: jax.Array
    block: jax.Array
    owned: jax.Array


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
        experts = plgpu.SMEM((_round_up(self.E, _LANES),), jnp.int32)
        return {
            "ids": plgpu.SMEM((_round_up(self.assignments, _LANES),), jnp.int32),
            "ids_arrived": plgpu.Barrier(num_arrivals=-(-self.assignments // _COPIED_IDS)),
            "count_of": experts,  # tokens of each expert
            "tiles_of": experts,
            "first_of": experts,  # each expert's first tile
            "expert_of": plgpu.SMEM((_round_up(self.most, _LANES),), jnp.int32),  # of each tile
        }

    def find(self, ids_gmem, scratch) -> jax.Array:
        """Fills the tables; returns the number of tiles. ids_gmem: as pad_ids makes them."""
        for start in range(0, self.assignments, _COPIED_IDS):
            part = pl.ds(start, min(_COPIED_IDS, ids_gmem.shape[0] - start))
            plgpu.copy_gmem_to_smem(
                ids_gmem.at[part], scratch["ids"].at[part], scratch["ids_arrived"]
            )
        plgpu.barrier_wait(scratch["ids_arrived"])

        # An expert a lane: each lane counts for itself, with nothing exchanged between them.
        experts = _lanes(scratch["count_of"].shape[0])

        def count(index, counts):
            # Four sums by turns, for an addition waits for the one before.
            ids = [scratch["ids"][index * 4 + ahead] for ahead in range(4)]
            return [c + jnp.where(i == experts, 1, 0) for c, i in zip(counts, ids, strict=True)]

        counts = [jnp.zeros_like(experts)] * 4
        counts = sum(count_up(ids_gmem.shape[0] // 4, 4, count, counts))
        counts = jnp.where(experts < self.E, counts, 0)  # an id of E or more is padding
        scratch["count_of"][...] = counts
        scratch["tiles_of"][...] = _div(counts + (self.N - 1), self.N)

        # Then a tile a lane: its expert is the number of those whose tiles end at or before it.
        tiles = _lanes(scratch["expert_of"].shape[0])

        def pass_expert(index, carry):
            end, first_of, expert_of = carry
            first_of = jnp.where(experts == index, end, first_of)
            end += scratch["tiles_of"][index]
            return end, first_of, expert_of + jnp.where(tiles >= end, 1, 0)

        init = jnp.int32(0), jnp.zeros_like(experts), jnp.zeros_like(tiles)
        num_tiles, first_of, expert_of = count_up(self.E, 8, pass_expert, init)
        scratch["first_of"][...] = first_of
        scratch["expert_of"][...] = expert_of
        return num_tiles

    def store_table(self, scratch, num_tiles, program, num_programs: int, table) -> None:
        """Writes Gathered's table, this program's share of the tiles."""

        @pl.when(program == 0)
        def _():
            table[2 * self.most] = num_tiles

        def store(index, _):
            tile = program + index * num_programs

            @pl.when(tile < self.most)
            def _():
                found = scratch["expert_of"][tile]
                expert = jnp.minimum(found, self.E - 1)
                table[2 * tile] = jnp.where(found < self.E, found, -1)
                table[2 * tile + 1] = self.owned(scratch, expert, tile)

        lax.fori_loop(0, -(-self.most // num_programs), store, None)

    def owned(self, scratch, expert, tile) -> jax.Array:
        """How many columns of an expert's tile have an owner."""
        before = (tile - scratch["first_of"][expert]) * self.N
        return jnp.minimum(scratch["count_of"][expert] - before, self.N)

    def unit(self, scratch, index, blocks: int) -> Unit:
        """The index-th unit, where each tile has so many blocks."""
        expert = scratch["expert_of"][_div(index, blocks)]
        first = scratch["first_of"][expert]
        tiles = scratch["tiles_of"][expert]
        index -= first * blocks
        block = lax.div(index, tiles)
        tile = first + index - block * tiles
        return Unit(expert, tile, block, self.owned(scratch, expert, tile))

    def gather(
        self, scratch, program, num_programs: int, x, weights, rows, weight_of, row_of
    ):  # fmt: skip
        """Fills the rows of this program's share of the assignments; returns the second half of it.

        The first half only starts to read x, before the memory is busy with weights.

        Args:
          x: [T, H] bf16.
          weights: [T * K] float32.
          rows: [P, H] bf16, rows of x; those without an owner stay as they are.
          weight_of: [P] float32, the routing weight of each row, likewise.
          row_of: [T * K] int32, each assignment's row, -1 for padding.
        """
        layout = row_layout(x.shape[1])
        share = -(-self.assignments // num_programs)
        early = min(share, max(1, _EARLY_ELEMENTS // x.shape[1]))

        def load(index):
            assignment = jnp.minimum(program + index * num_programs, self.assignments - 1)
            token = x.at[_div(assignment, self.K)]
            return plgpu.load(token, layout=layout, optimized=False), weights[assignment]

        loaded = [load(jnp.int32(index)) for index in range(early)]

        def finish():
            ids = plgpu.load(scratch["ids"], layout=_one_a_lane(scratch["ids"].shape[0]))
            lanes = _lanes(ids.shape[0])

            def store(index, row_of_x, routing_weight):
                assignment = program + index * num_programs
                # Beyond the last assignment there are other numbers, or none.
                expert = scratch["ids"][jnp.minimum(assignment, self.assignments - 1)]

                routed = (expert >= 0) & (expert < self.E)

                @pl.when((assignment < self.assignments) & routed)
                def _():
                    earlier = (ids == expert) & (lanes < assignment)
                    rank = jnp.sum(jnp.where(earlier, jnp.int32(1), jnp.int32(0)))
                    row = scratch["first_of"][expert] * self.N + rank
                    rows[row] = row_of_x
                    weight_of[row] = routing_weight
                    row_of[assignment] = row

                @pl.when((assignment < self.assignments) & jnp.logical_not(routed))
                def _():
                    row_of[assignment] = jnp.int32(-1)

            for index, values in enumerate(loaded):
                store(jnp.int32(index), *values)
            lax.fori_loop(early, share, lambda index, _: store(index, *load(index)), None)

        return finish
