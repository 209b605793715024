"""Phase 3 of the router: logits, softmax and top-k of a token."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.router.work import RANKS, Refs, Work, round_up

_INT32_MIN = -(2**31)
# One expert a lane.
_LANE = functools.partial(plgpu.Layout.WG_STRIDED, vec_size=1)
# One rank a row, 8 lanes along its experts: sums over experts end in three shuffles.
_TILE = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 64), (4, 8))), warp_dims=(-4,), lane_dims=(-2, -3), vector_dim=-1
)
_ALONG_EXPERTS = _TILE.reduce(0)
# Few elements, in each warp the same.
_FEW = plgpu.Layout.WGMMA.reduce(0)


def choice_scratch(work: Work) -> dict[str, Any]:
    """Shared memory of choose."""
    few = round_up(work.K, RANKS)
    return {
        "keys_smem": plgpu.SMEM((work.lanes,), jnp.int32),
        "ranks_smem": plgpu.SMEM((work.lanes,), jnp.int32),
        "logits_smem": plgpu.SMEM((work.lanes,), jnp.float32),
        "ids_smem": plgpu.SMEM((few,), jnp.int32),
        "weights_smem": plgpu.SMEM((few,), jnp.float32),
    }


def choose(work: Work, refs: Refs, program) -> None:
    """logits, ids and weights of this program's tokens."""

    def one_token(index, _):
        token = program + index * work.num_programs
        logits = _add_partials(work, refs, token)  # [lanes]
        ranks = _rank(work, refs, logits)
        refs.scratch["logits_smem"][...] = logits
        refs.scratch["ranks_smem"][...] = ranks
        _write(refs.scratch["logits_smem"], refs.logits.at[token], work.E)
        _write_choice(work, refs, token)
        return ()

    lax.fori_loop(0, work.share(program, work.T), one_token, ())


def _add_partials(work: Work, refs: Refs, token) -> jax.Array:
    """[lanes] float32: the logits, -inf where no expert is; splits are added in order."""
    layout = _LANE((work.lanes,))
    expert = plgpu.broadcasted_iota(jnp.int32, (work.lanes,), 0, layout=layout)
    logits = jnp.zeros_like(expert, jnp.float32)
    for split in range(work.splits):
        logits += plgpu.load(refs.partials.at[split, token], layout=layout)
    return jnp.where(expert < work.E, logits, -jnp.inf)


def _rank(work: Work, refs: Refs, logits: jax.Array) -> jax.Array:
    """[lanes] int32: how many experts come before each one; of equal logits the lower index first.

    Floats are compared as integers of the same order, in which NaN is the largest and equal to
    itself: whatever the logits are, the first K ranks belong to K experts.
    """
    bits = lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.int32)  # no -0.0
    keys = jnp.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    keys = jnp.where(logits != logits, 0x7FC00000, keys)
    expert = plgpu.broadcasted_iota(jnp.int32, keys.shape, 0, layout=_LANE(keys.shape))
    keys = jnp.where(expert < work.E, keys, _INT32_MIN + 1)
    # Cycles of each, as guessed from the instructions.
    by_counting, by_rounds = 5 * work.E * (work.lanes // 128), 300 * work.K
    if by_counting <= by_rounds:
        return _rank_by_counting(work, refs, keys, expert)
    return _rank_by_rounds(work, keys, expert)


def _rank_by_counting(work: Work, refs: Refs, keys: jax.Array, expert: jax.Array) -> jax.Array:
    """Each lane compares its own experts with all E; nothing is exchanged but through one load."""
    keys_smem = refs.scratch["keys_smem"]
    keys_smem[...] = keys
    one_less = keys - 1
    several = 16 if work.E % 16 == 0 else 8

    def count(index, ranks):
        start = index * several
        until_own = expert - start
        for ahead in range(several):
            # Against a lower index a tie is lost.
            bar = jnp.where(ahead < until_own, one_less, keys)
            ranks += jnp.where(keys_smem[start + ahead] > bar, 1, 0)
        return ranks

    return lax.fori_loop(0, work.E // several, count, jnp.zeros_like(keys))


def _rank_by_rounds(work: Work, keys: jax.Array, expert: jax.Array) -> jax.Array:
    """K times the largest one over all lanes; what is not chosen ranks E."""

    def one_round(rank, carry):
        keys, ranks = carry
        # The lowest index by a maximum: the hardware has one over the lanes of a warp.
        is_next = expert == -jnp.max(jnp.where(keys == jnp.max(keys), -expert, _INT32_MIN))
        return jnp.where(is_next, _INT32_MIN, keys), jnp.where(is_next, rank, ranks)

    _, ranks = lax.fori_loop(0, work.K, one_round, (keys, jnp.full_like(keys, work.E)))
    return ranks


def _write_choice(work: Work, refs: Refs, token) -> None:
    """Ids and weights of one token, from its logits and ranks in shared memory.

    On a tile of 16 ranks by all experts: a sum along a row picks what has that rank.
    """
    shape = (RANKS, work.lanes)

    def spread(name):
        row = plgpu.load(refs.scratch[name], layout=_ALONG_EXPERTS, optimized=False)
        return plgpu.layout_cast(lax.broadcast_in_dim(row, shape, (1,)), _TILE)

    logits, ranks = spread("logits_smem"), spread("ranks_smem")
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_TILE)
    expert = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_TILE)
    is_chosen = ranks < work.K

    largest = jnp.max(logits, axis=1)  # [RANKS], in each the same
    largest = plgpu.layout_cast(lax.broadcast_in_dim(largest, shape, (0,)), _TILE)
    exponentials = jnp.exp(logits - largest)
    counted = jnp.where(is_chosen, exponentials, 0.0) if work.norm_topk_prob else exponentials
    total = jnp.sum(counted, axis=1)
    for first in range(0, work.K, RANKS):
        here = ranks == row + first
        part = pl.ds(first, RANKS)
        refs.scratch["ids_smem"][part] = jnp.sum(jnp.where(here, expert, 0), axis=1)
        weights = jnp.sum(jnp.where(here, exponentials, 0.0), axis=1) / total
        refs.scratch["weights_smem"][part] = weights
    _write(refs.scratch["ids_smem"], refs.ids.at[token], work.K)
    _write(refs.scratch["weights_smem"], refs.weights.at[token], work.K)


def _write(smem, gmem, count: int) -> None:
    """Copies the first `count` elements from shared to global memory."""
    if count % 8 == 0:
        layout = _LANE((count,)) if count % 128 == 0 else _FEW
        gmem[...] = plgpu.load(smem.at[pl.ds(0, count)], layout=layout, optimized=False)
    else:
        for index in range(count):
            gmem[index] = smem[index]
