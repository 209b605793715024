"""Each expert's tokens in tiles: which rows they get, built by each thread block from the ids.

The assignments (t, k) of each expert are compacted into tiles of block_n rows. A tile holds rows of
one expert only; tiles are ordered by expert, an expert's rows by assignment:

    ids [[0, 2], [2, 5], [2, 0]], block_n 2:
      tile 0: expert 0, tokens 0 2     tile 1: expert 2, tokens 0 1
      tile 2: expert 2, tokens 2 -     tile 3: expert 5, tokens 1 -
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.operands import MAX_BOX, round_up
from pallas_kernels.mosaic.pipeline import unrolled
from pallas_kernels.mosaic.warpgroup import LANES, add_histogram, lane_indices, one_per_lane

# What the tensor cores take as columns: multiples of 8.
MIN_BLOCK_N = 8
MAX_BLOCK_N = 64
# Ids are copied 16 bytes at a time.
_IDS_MULTIPLE = 4


def default_block_n(T: int, K: int, E: int) -> int:
    """The smallest multiple of 8 that is more than an expert's mean number of tokens, or 64.

    Fewer rows and a popular expert's weights are read again for its further tiles; more, and tiles
    are padded. Within 1% of the fastest at T = 32 to 512, where it was measured (Qwen3-30B-A3B's
    layer, uniform routing: docs/lab.md).
    """
    more_than_mean = (T * K // (E * MIN_BLOCK_N) + 1) * MIN_BLOCK_N
    return min(more_than_mean, MAX_BLOCK_N)


def max_tiles(T: int, K: int, E: int, block_n: int) -> int:
    """The most tiles that any routing of T * K assignments over E experts can fill.

    With u experts in use there are at most u + (T*K - u) // block_n tiles, which grows with u.
    """
    u = min(T * K, E)
    return u + (T * K - u) // block_n


def pad_ids(expert_ids: jax.Array) -> jax.Array:
    """[T, K] to [T * K], filled up to a multiple of 4 with padding: what build takes."""
    return jnp.pad(
        expert_ids.reshape(-1), (0, -expert_ids.size % _IDS_MULTIPLE), constant_values=-1
    )


def _sum_of_each(count: int, like: jax.Array, term: Callable[[Any], jax.Array]) -> jax.Array:
    """The sum of term(index), an array like `like`, for each index below `count`, a multiple of 4.

    Four sums take turns, because an addition waits for the one before.
    """

    def add(index, sums):
        return [total + term(index * 4 + turn) for turn, total in enumerate(sums)]

    return sum(unrolled(count // 4, 4, add, [jnp.zeros_like(like)] * 4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertSchedule:
    """The tiles of a batch, and the shared memory in which a block keeps what it knows of them.

    Attributes:
      T, K, E: tokens, experts of each, experts in all.
      block_n: rows of a tile.
    """

    T: int
    K: int
    E: int
    block_n: int

    @property
    def assignments(self) -> int:
        return self.T * self.K

    @property
    def max_tiles(self) -> int:
        return max_tiles(self.T, self.K, self.E, self.block_n)

    @property
    def rows(self) -> int:
        """Rows of all tiles, used or not."""
        return self.max_tiles * self.block_n

    def scratch_types(self) -> dict[str, Any]:
        experts = plgpu.SMEM((round_up(self.E, LANES),), jnp.int32)
        return {
            "ids": plgpu.SMEM((round_up(self.assignments, LANES),), jnp.int32),
            "ids_full": plgpu.Barrier(num_arrivals=-(-self.assignments // MAX_BOX)),
            "count_of": experts,  # tokens of each expert
            "tiles_of": experts,
            "first_of": experts,  # each expert's first tile
        }

    def build(self, ids_gmem, scratch) -> jax.Array:
        """Fills all tables in shared memory; returns the number of tiles.

        Args:
          ids_gmem: from pad_ids.
          scratch: of scratch_types.
        """
        for start in range(0, self.assignments, MAX_BOX):
            part = pl.ds(start, min(MAX_BOX, ids_gmem.shape[0] - start))
            plgpu.copy_gmem_to_smem(ids_gmem.at[part], scratch["ids"].at[part], scratch["ids_full"])
        count_of, tiles_of = scratch["count_of"], scratch["tiles_of"]
        count_of[...] = jnp.zeros(count_of.shape, count_of.dtype)
        plgpu.barrier_wait(scratch["ids_full"])
        add_histogram(scratch["ids"], self.assignments, self.E, count_of)
        counts = plgpu.load(count_of, layout=one_per_lane(count_of.shape[0]))
        tiles_of[...] = lax.div(counts + (self.block_n - 1), jnp.int32(self.block_n))

        # An expert a lane: its first tile comes after all those of lower experts.
        experts = lane_indices(tiles_of.shape[0])
        scratch["first_of"][...] = _sum_of_each(
            round_up(self.E, 4), experts, lambda e: jnp.where(e < experts, tiles_of[e], 0)
        )
        return scratch["first_of"][self.E - 1] + tiles_of[self.E - 1]

    def store_table(self, scratch, num_tiles, block_id, num_blocks: int, table) -> None:
        """Writes GatheredTiles.table: this block's share of the experts and of the unused tiles."""

        @pl.when(block_id == 0)
        def _():
            table[2 * self.max_tiles] = num_tiles

        def store_expert(index, _):
            expert = block_id + index * num_blocks

            @pl.when(expert < self.E)
            def _():
                first = scratch["first_of"][expert]

                def store(tile, _):
                    table[2 * tile] = expert
                    table[2 * tile + 1] = self.valid_rows(scratch, expert, tile)

                lax.fori_loop(first, first + scratch["tiles_of"][expert], store, None)

        def store_unused(index, _):
            tile = num_tiles + block_id + index * num_blocks

            @pl.when(tile < self.max_tiles)
            def _():
                table[2 * tile] = jnp.int32(-1)
                table[2 * tile + 1] = jnp.int32(0)

        lax.fori_loop(0, -(-self.E // num_blocks), store_expert, None)
        lax.fori_loop(0, -(-self.max_tiles // num_blocks), store_unused, None)

    def valid_rows(self, scratch, expert, tile) -> jax.Array:
        """How many rows of an expert's tile are valid."""
        before = (tile - scratch["first_of"][expert]) * self.block_n
        return jnp.minimum(scratch["count_of"][expert] - before, self.block_n)
