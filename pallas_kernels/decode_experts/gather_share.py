"""One program's share of the rows of all tiles, copied from x.

Assignment a goes to row first_tile[expert] * N + rank, its rank being how many earlier ones have
its expert. Programs take assignments by turns, and several at once.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_experts.tiles import Tiles, lanes_of, one_a_lane
from pallas_kernels.mosaic import row_layout

# Elements of x that a program loads before it stores the first of them, in registers.
_ELEMENTS_AT_ONCE = 16384


def gather_share(
    tiles: Tiles, scratch, program, num_programs: int, x, weights, rows, weight_of, row_of
) -> Callable[[], None]:
    """Starts to read this program's share of x; returns the function that stores it, and the rest.

    That one is to be called once `tiles` are found. What fits in registers is read before, while
    the memory is not yet busy with weights.

    Args:
      tiles: of the batch.
      scratch: their shared memory.
      program, num_programs: this one's number, and of how many.
      x: [T, H] bf16.
      weights: [T * K] float32.
      rows: [P, H] bf16, rows of x; those without an owner stay as they are.
      weight_of: [P] float32, the routing weight of each row, likewise.
      row_of: [T * K] int32, each assignment's row, -1 for padding.
    """
    layout = row_layout(x.shape[1])
    share = -(-tiles.assignments // num_programs)
    several = min(share, max(1, _ELEMENTS_AT_ONCE // x.shape[1]))

    def assignments_of(batch):
        return [program + (batch * several + place) * num_programs for place in range(several)]

    def load(assignment):
        assignment = jnp.minimum(assignment, tiles.assignments - 1)
        token = x.at[lax.div(assignment, jnp.int32(tiles.K))]
        return plgpu.load(token, layout=layout, optimized=False), weights[assignment]

    def store(assignment, rank, row_of_x, routing_weight):
        expert = _expert(tiles, scratch, assignment)
        routed = (expert >= 0) & (expert < tiles.E)

        @pl.when((assignment < tiles.assignments) & routed)
        def _():
            row = scratch["first_of"][expert] * tiles.N + rank
            rows[row] = row_of_x
            weight_of[row] = routing_weight
            row_of[assignment] = row

        @pl.when((assignment < tiles.assignments) & jnp.logical_not(routed))
        def _():
            row_of[assignment] = jnp.int32(-1)

    def store_batch(batch, loaded):
        assignments = assignments_of(batch)
        ranks = _ranks(tiles, scratch, assignments)
        for assignment, rank, values in zip(assignments, ranks, loaded, strict=True):
            store(assignment, rank, *values)

    def load_and_store_batch(batch, _):
        store_batch(batch, [load(assignment) for assignment in assignments_of(batch)])

    loaded = [load(assignment) for assignment in assignments_of(0)]

    def finish():
        store_batch(0, loaded)
        lax.fori_loop(1, -(-share // several), load_and_store_batch, None)

    return finish


def _expert(tiles: Tiles, scratch, assignment) -> jax.Array:
    """Its id; of one beyond the last, the last one's, for there are other numbers, or none."""
    return scratch["ids"][jnp.minimum(assignment, tiles.assignments - 1)]


def _ranks(tiles: Tiles, scratch, assignments: Sequence[Any]) -> list[jax.Array]:
    """Of each of these assignments, how many earlier ones have its expert.

    A sum over all lanes takes long, so several ranks are the digits of one.
    """
    ids = plgpu.load(scratch["ids"], layout=one_a_lane(scratch["ids"].shape[0]))
    lanes = lanes_of(ids.shape[0])
    bits = max(1, (tiles.assignments - 1).bit_length())

    def earlier(assignment):
        same = (ids == _expert(tiles, scratch, assignment)) & (lanes < assignment)
        return jnp.where(same, 1, 0)

    ranks, several = [], 31 // bits
    for some in itertools.batched(assignments, several):
        number = jnp.sum(sum(earlier(a) << bits * place for place, a in enumerate(some)))
        ranks += [(number >> bits * place) & ((1 << bits) - 1) for place in range(len(some))]
    return ranks
