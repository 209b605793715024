"""Phase 4 of the router: the Grouping."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import count_up
from pallas_kernels.router.work import RANKS, Refs, Work

# Experts as [E / 32, 32]: 32 lanes of one warp are the bits of one word.
_BITS = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 32), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)
_WORDS = _BITS.reduce(1)


def grouping_scratch(work: Work) -> dict[str, Any]:
    """Shared memory of group."""
    return {
        "chosen_smem": plgpu.SMEM((work.T, RANKS), jnp.int32),
        "chosen_arrived": plgpu.Barrier(),
        "count_smem": plgpu.SMEM((work.words, 32), jnp.int32),
        "first_smem": plgpu.SMEM((work.words, 32), jnp.int32),
        "row_smem": plgpu.SMEM((work.words, 32), jnp.int32),
    }


def group(work: Work, refs: Refs, program) -> None:
    """The rows of this program's tokens, and the unowned rows of its tiles.

    Every program counts all experts' tokens for itself: a word of bits for 32 tokens.
    """
    plgpu.copy_gmem_to_smem(
        refs.chosen, refs.scratch["chosen_smem"], refs.scratch["chosen_arrived"]
    )
    plgpu.barrier_wait(refs.scratch["chosen_arrived"])
    masks = _token_masks(work, refs)
    count = sum(_count_set_bits(mask) for mask in masks)  # [words, 32]
    tiles = lax.div(count + (work.token_tile - 1), jnp.full_like(count, work.token_tile))
    first, num_tiles = _sums_before(work, refs, tiles)
    refs.scratch["count_smem"][...] = count
    refs.scratch["first_smem"][...] = first

    def one_token(index, _):
        _write_rows(work, refs, masks, first, program + index * work.num_programs)
        return ()

    def one_tile(index, _):
        _fill_tile(work, refs, num_tiles, program + index * work.num_programs)
        return ()

    lax.fori_loop(0, work.share(program, work.T), one_token, ())
    lax.fori_loop(0, work.share(program, work.capacity), one_tile, ())


def _token_masks(work: Work, refs: Refs) -> list[jax.Array]:
    """[words, 32] int32 for each 32 tokens: bit t is set if token t goes to that expert."""
    shape = (work.words, 32)
    lane = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_BITS)

    def add(start, token, mask):
        chosen = refs.scratch["chosen_smem"].at[start + token, pl.ds(0, work.words)]
        chosen = plgpu.load(chosen, layout=_WORDS, optimized=False)
        chosen = plgpu.layout_cast(lax.broadcast_in_dim(chosen, shape, (0,)), _BITS)
        return mask | ((chosen >> lane) & 1) << token

    masks = []
    for start in range(0, work.T, 32):
        count = min(32, work.T - start)
        masks.append(count_up(count, 8, functools.partial(add, start), jnp.zeros_like(lane)))
    return masks


def _sums_before(work: Work, refs: Refs, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[words, 32] sums of the values of all lower experts, and the sum of all.

    Bit by bit of the values: lanes that have the bit make up a word, whose lower bits are counted.
    """
    shape = values.shape
    word = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_BITS)
    lane = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_BITS)
    before, totals = jnp.zeros_like(values), None
    largest = -(-work.T // work.token_tile)
    for bit in range(largest.bit_length()):
        plane = jnp.sum(((values >> bit) & 1) << lane, axis=1)  # [words]
        spread = plgpu.layout_cast(lax.broadcast_in_dim(plane, shape, (0,)), _BITS)
        before += _count_set_bits(spread & ((1 << lane) - 1)) << bit
        total = _count_set_bits(spread) << bit
        totals = total if totals is None else totals + total
    refs.scratch["row_smem"][...] = totals  # every lane of a word has the same
    everything = jnp.int32(0)
    for index in range(work.words):
        total = refs.scratch["row_smem"][index, 0]
        before += jnp.where(word > index, total, 0)
        everything += total
    return before, everything


def _count_set_bits(word: jax.Array) -> jax.Array:
    """How many bits of each int32 are set; what an arithmetic shift brings in, masks take away."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24


def _write_rows(work: Work, refs: Refs, masks, first: jax.Array, token) -> None:
    """row_of of one token, and all that is known of those rows."""
    # All loads come before the first store, which no compiler would let them pass.
    experts = [refs.ids[token, k] for k in range(work.K)]
    weights = [refs.weights[token, k] for k in range(work.K)]
    rows = first * work.token_tile
    for index, mask in enumerate(masks):
        tokens = jnp.clip(token - 32 * index, 0, 32)
        # Shifts by 32 are not defined.
        below = jnp.where(tokens == 32, -1, (jnp.int32(1) << jnp.minimum(tokens, 31)) - 1)
        rows += _count_set_bits(mask & below)
    row_smem = refs.scratch["row_smem"]
    row_smem[...] = rows
    rows = [row_smem[expert >> 5, expert & 31] for expert in experts]
    for k, (expert, weight, row) in enumerate(zip(experts, weights, rows, strict=True)):
        refs.row_of[token, k] = row
        refs.token_of[row] = token
        refs.expert_of[row] = expert
        refs.weight_of[row] = weight


def _fill_tile(work: Work, refs: Refs, num_tiles, tile) -> None:
    """Marks the rows of one tile that no token owns."""
    first_smem, count_smem = refs.scratch["first_smem"], refs.scratch["count_smem"]
    # The last expert whose first tile is not beyond this one: experts without tokens have the
    # first tile of the next one that has some.
    expert = jnp.int32(0)
    width = 1 << (work.lanes - 1).bit_length()
    while width > 1:
        width //= 2
        candidate = jnp.minimum(expert + width, work.lanes - 1)
        expert = jnp.where(first_smem[candidate >> 5, candidate & 31] <= tile, candidate, expert)
    index = tile - first_smem[expert >> 5, expert & 31]
    used = count_smem[expert >> 5, expert & 31] - index * work.token_tile
    used = jnp.where(tile < num_tiles, jnp.minimum(used, work.token_tile), 0)

    def fill(row, _):
        row = tile * work.token_tile + row
        refs.token_of[row] = jnp.int32(-1)
        refs.expert_of[row] = jnp.int32(-1)
        refs.weight_of[row] = jnp.float32(0)
        return ()

    lax.fori_loop(used, work.token_tile, fill, ())
