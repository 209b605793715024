"""Each expert's tokens side by side: the launch that comes before the products of expert_major.

    ids --> schedule: tiles of one expert each   (every block, from the ids: expert_schedule.py)
    x   --> rows of those tiles                  (each block its share of the assignments)

XLA takes several kernels for the same. No block waits for another.

Assignment a goes to row first_of[expert] * block_n + rank, its rank being how many earlier ones
have its expert. Block b takes assignments b, b + num_blocks, ..., several at once.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_experts.expert_schedule import ExpertSchedule, pad_ids
from pallas_kernels.decode_experts.token_tiles import GatheredTiles
from pallas_kernels.mosaic.device import core_count, launch
from pallas_kernels.mosaic.warpgroup import lane_indices, one_per_lane, row_layout

# Each block looks at all ids. Measured up to this number (1024 tokens, K = 8), where that is still
# faster than XLA's kernels for each step, which do it beyond.
MAX_ASSIGNMENTS = 8192
# Elements of x that a block loads before it stores the first of them, in registers.
_ELEMENTS_AT_ONCE = 16384


def gather_by_kernel(
    x: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    schedule: ExpertSchedule,
    interpret: Any,
) -> GatheredTiles:
    """Builds the schedule and gathers the rows, at most MAX_ASSIGNMENTS of them, in one launch.

    Args:
      x: [T, H] bf16.
      expert_ids: [T, K] int32; ids outside [0, E) are padding and get no row.
      expert_weights: [T, K] float32; padding's may be anything.
      schedule: of that T, K and E.
      interpret: as in decode_experts.
    """
    T, K = expert_ids.shape
    num_blocks = min(core_count(interpret), T * K)

    def kernel(
        block_id, ids_gmem, x_gmem, weights_gmem, rows_gmem, weight_gmem, row_gmem, table_gmem,
        tables,
    ):  # fmt: skip
        finish = _start_share(
            schedule, tables, block_id, num_blocks,
            x_gmem, weights_gmem, rows_gmem, weight_gmem, row_gmem,
        )  # fmt: skip
        num_tiles = schedule.build(ids_gmem, tables)
        schedule.store_table(tables, num_tiles, block_id, num_blocks, table_gmem)
        finish()

    struct = jax.ShapeDtypeStruct
    rows, weight_of, row_of, table = launch(
        kernel,
        name="gather_rows",
        num_blocks=num_blocks,
        out_type=(
            struct((schedule.rows, x.shape[1]), jnp.bfloat16),
            struct((schedule.rows,), jnp.float32),
            struct((T * K,), jnp.int32),
            struct((2 * schedule.max_tiles + 1,), jnp.int32),
        ),
        scratch_types={"tables": schedule.scratch_types()},
        interpret=interpret,
    )(pad_ids(expert_ids), x, expert_weights.reshape(T * K))
    return GatheredTiles(
        rows=rows, weight_of=weight_of, row_of=row_of.reshape(T, K), table=table, N=schedule.block_n
    )


def gather_by_xla(
    x: jax.Array, expert_ids: jax.Array, expert_weights: jax.Array, schedule: ExpertSchedule
) -> GatheredTiles:
    """The same by XLA, for any number of assignments; padding rows get some token's values.

    A running count for each expert gives ranks; a scatter to distinct rows inverts row_of.
    """
    T, K, E, N, P = schedule.T, schedule.K, schedule.E, schedule.block_n, schedule.rows
    ids = expert_ids.reshape(-1)  # [TK]
    valid = (ids >= 0) & (ids < E)
    chosen = ids[:, None] == jnp.arange(E, dtype=jnp.int32)  # [TK, E]
    counts = jnp.cumsum(chosen, axis=0, dtype=jnp.int32)
    rank = jnp.sum(jnp.where(chosen, counts, 0), axis=1) - 1
    tiles = -(-counts[-1] // N)  # [E]
    first_row = N * (jnp.cumsum(tiles) - tiles)
    row = jnp.where(valid, first_row[jnp.where(valid, ids, 0)] + rank, -1)  # [TK]
    place = jnp.where(valid, row, P)  # P is outside, and dropped

    def inverted(padding, values):
        return jnp.full(P, padding, values.dtype).at[place].set(values, mode="drop")

    token_of = inverted(-1, jnp.arange(T * K, dtype=jnp.int32) // K)
    experts = inverted(-1, ids).reshape(-1, N)  # [tiles, N]
    valid_rows = jnp.sum(experts >= 0, axis=1, dtype=jnp.int32)
    return GatheredTiles(
        rows=x[jnp.maximum(token_of, 0)],
        weight_of=inverted(0, expert_weights.reshape(-1)),
        row_of=row.reshape(T, K),
        table=jnp.concatenate(
            [
                jnp.stack([experts[:, 0], valid_rows], axis=1).reshape(-1),
                jnp.sum(valid_rows > 0, dtype=jnp.int32)[None],
            ]
        ),
        N=N,
    )


def _start_share(
    schedule: ExpertSchedule,
    scratch,
    block_id,
    num_blocks: int,
    x,
    weights,
    rows,
    weight_of,
    row_of,
) -> Callable[[], None]:
    """Starts to read this block's share of x; returns the function that stores it, and the rest.

    That one is to be called once the schedule is built. What fits in registers is read before,
    while the memory is not yet busy with weights.

    Args:
      schedule: of the batch.
      scratch: its shared memory.
      block_id: this block's.
      num_blocks: of the grid.
      x: [T, H] bf16.
      weights: [T * K] float32.
      rows: [P, H] bf16, rows of x; padding rows stay as they are.
      weight_of: [P] float32, the routing weight of each row, likewise.
      row_of: [T * K] int32, each assignment's row, -1 for padding.
    """
    layout = row_layout(x.shape[1])
    share = -(-schedule.assignments // num_blocks)
    several = min(share, max(1, _ELEMENTS_AT_ONCE // x.shape[1]))

    def assignments_of(batch):
        return [block_id + (batch * several + place) * num_blocks for place in range(several)]

    def load(assignment):
        assignment = jnp.minimum(assignment, schedule.assignments - 1)
        token = x.at[lax.div(assignment, jnp.int32(schedule.K))]
        return plgpu.load(token, layout=layout, optimized=False), weights[assignment]

    def store(assignment, rank, row_of_x, routing_weight):
        expert = _expert(schedule, scratch, assignment)
        routed = (expert >= 0) & (expert < schedule.E)

        @pl.when((assignment < schedule.assignments) & routed)
        def _():
            row = scratch["first_of"][expert] * schedule.block_n + rank
            rows[row] = row_of_x
            weight_of[row] = routing_weight
            row_of[assignment] = row

        @pl.when((assignment < schedule.assignments) & jnp.logical_not(routed))
        def _():
            row_of[assignment] = jnp.int32(-1)

    def store_batch(batch, loaded):
        assignments = assignments_of(batch)
        ranks = _ranks(schedule, scratch, assignments)
        for assignment, rank, values in zip(assignments, ranks, loaded, strict=True):
            store(assignment, rank, *values)

    def load_and_store_batch(batch, _):
        store_batch(batch, [load(assignment) for assignment in assignments_of(batch)])

    loaded = [load(assignment) for assignment in assignments_of(0)]

    def finish():
        store_batch(0, loaded)
        lax.fori_loop(1, -(-share // several), load_and_store_batch, None)

    return finish


def _expert(schedule: ExpertSchedule, scratch, assignment) -> jax.Array:
    """Its id; of one beyond the last, the last one's, because other numbers may follow, or none."""
    return scratch["ids"][jnp.minimum(assignment, schedule.assignments - 1)]


def _ranks(schedule: ExpertSchedule, scratch, assignments: Sequence[Any]) -> list[jax.Array]:
    """Of each of these assignments, how many earlier ones have its expert.

    A sum over all lanes takes long, so several ranks are the digits of one.
    """
    ids = plgpu.load(scratch["ids"], layout=one_per_lane(scratch["ids"].shape[0]))
    lanes = lane_indices(ids.shape[0])
    bits = max(1, (schedule.assignments - 1).bit_length())

    def earlier(assignment):
        same = (ids == _expert(schedule, scratch, assignment)) & (lanes < assignment)
        return jnp.where(same, 1, 0)

    ranks, several = [], 31 // bits
    for some in itertools.batched(assignments, several):
        number = jnp.sum(sum(earlier(a) << bits * place for place, a in enumerate(some)))
        ranks += [(number >> bits * place) & ((1 << bits) - 1) for place in range(len(some))]
    return ranks
