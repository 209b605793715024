"""The router kernel's phases, each a function of one program's work; kernel.py says how they join.

Every phase ends with results in global memory and begins by reading what other programs left there,
so that each can also be a launch of its own, as interpret mode needs it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # experts of a unit: the rows that one wgmma takes
COLUMNS = 64  # columns of a piece: 128 bytes of bf16, the swizzle's width
RANKS = 16  # rows of _TILE
_MOST_SPLITS = 32
_OPERAND = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_INT32_MIN = -(2**31)

# One expert a lane.
_LANE = functools.partial(plgpu.Layout.WG_STRIDED, vec_size=1)
# One rank a row, 8 lanes along its experts: sums over experts end in three shuffles.
_TILE = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 64), (4, 8))), warp_dims=(-4,), lane_dims=(-2, -3), vector_dim=-1
)
_ALONG_EXPERTS = _TILE.reduce(0)
_ALONG_RANKS = _TILE.reduce(1)
# Experts as [E / 32, 32]: 32 lanes of one warp are the bits of one word.
_BITS = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 32), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)
_WORDS = _BITS.reduce(1)
# Few elements, in each warp the same.
_FEW = plgpu.Layout.WGMMA.reduce(0)
# 64 columns, in each warp the same.
_CHUNK = plgpu.Layout.TILED(
    plgpu.Tiling(((64,), (2,))),
    warp_dims=(plgpu.Replicated(4),),
    lane_dims=(-2,),
    vector_dim=-1,
)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _div(a, b):
    return lax.div(jnp.int32(a), jnp.int32(b))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """How one call is cut. Only `pieces` sets an order of sums, and it depends on H alone.

    Attributes:
      token_tile: rows in a tile of the Grouping; None if none is wanted.
      capacity: its tiles.
      num_programs: programs in the grid; token t and tile j belong to program t, j % num_programs.
    """

    T: int
    H: int
    E: int
    K: int
    norm_topk_prob: bool
    norm_eps: float | None
    token_tile: int | None
    capacity: int
    num_programs: int

    @property
    def N(self) -> int:
        """Columns of the product: the tokens, and zeros."""
        return _round_up(self.T, 8)

    @property
    def lanes(self) -> int:
        """E, rounded up to whole warpgroups."""
        return _round_up(self.E, 128)

    @property
    def words(self) -> int:
        return self.lanes // 32

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
      chosen: [T, RANKS] int32, bit e % 32 of word e // 32 is set if the token goes to expert e.
      row_of, token_of, expert_of, weight_of: the Grouping's.
    """

    x: Any = None
    gate: Any = None
    norm_weight: Any = None
    normed: Any = None
    partials: Any = None
    logits: Any = None
    ids: Any = None
    weights: Any = None
    chosen: Any = None
    row_of: Any = None
    token_of: Any = None
    expert_of: Any = None
    weight_of: Any = None
    scratch: dict[str, Any] = dataclasses.field(default_factory=dict)


def product_scratch(work: Work) -> dict[str, Any]:
    """Shared memory of start_gate and multiply: a slot for each piece, none used twice."""
    slots = work.slots
    return {
        "gate_smem": plgpu.SMEM((slots, ROWS, COLUMNS), jnp.bfloat16, transforms=_OPERAND),
        "x_smem": plgpu.SMEM((slots, work.N, COLUMNS), jnp.bfloat16, transforms=_OPERAND),
        "gate_arrived": plgpu.Barrier(num_barriers=slots),
        "x_arrived": plgpu.Barrier(num_barriers=slots),
    }


def choice_scratch(work: Work) -> dict[str, Any]:
    """Shared memory of choose."""
    few = _round_up(work.K, RANKS)
    return {
        "keys_smem": plgpu.SMEM((work.lanes,), jnp.int32),
        "ranks_smem": plgpu.SMEM((work.lanes,), jnp.int32),
        "logits_smem": plgpu.SMEM((work.lanes,), jnp.float32),
        "ids_smem": plgpu.SMEM((few,), jnp.int32),
        "weights_smem": plgpu.SMEM((few,), jnp.float32),
    }


def grouping_scratch(work: Work) -> dict[str, Any]:
    """Shared memory of group."""
    return {
        "chosen_smem": plgpu.SMEM((work.T, RANKS), jnp.int32),
        "chosen_arrived": plgpu.Barrier(),
        "count_smem": plgpu.SMEM((work.words, 32), jnp.int32),
        "first_smem": plgpu.SMEM((work.words, 32), jnp.int32),
        "row_smem": plgpu.SMEM((work.words, 32), jnp.int32),
    }


# --- phase 1: RMSNorm


def normalise(work: Work, refs: Refs, program) -> None:
    """normed[t] = norm_weight * bf16(x[t] / rms(x[t])), for this program's tokens."""
    chunks = work.H // COLUMNS

    def load(ref, chunk):
        at = pl.ds(chunk * COLUMNS, COLUMNS)
        return plgpu.load(ref.at[at], layout=_CHUNK, optimized=False).astype(jnp.float32)

    def one_token(index, _):
        token = program + index * work.num_programs
        x, out = refs.x.at[token], refs.normed.at[token]

        def add_squares(chunk, squares):
            part = load(x, chunk)
            return squares + part * part

        zeros = plgpu.layout_cast(jnp.zeros((COLUMNS,), jnp.float32), _CHUNK)
        squares = _unrolled(chunks, add_squares, zeros)
        scale = lax.rsqrt(jnp.sum(squares) / work.H + work.norm_eps)

        def write(chunk, carry):
            part = (load(x, chunk) * scale).astype(jnp.bfloat16).astype(jnp.float32)
            weighted = (load(refs.norm_weight, chunk) * part).astype(jnp.bfloat16)
            out[pl.ds(chunk * COLUMNS, COLUMNS)] = weighted
            return carry

        return _unrolled(chunks, write, ())

    lax.fori_loop(0, work.share(program, work.T), one_token, ())


def _unrolled(count: int, body, carry):
    """A loop of `count` rounds, several at a time: loads that wait for memory should overlap."""
    several = 16

    def some(index, carry):
        for ahead in range(several):
            carry = body(index * several + ahead, carry)
        return carry

    carry = lax.fori_loop(0, count // several, some, carry)
    for rest in range(count // several * several, count):
        carry = body(rest, carry)
    return carry


# --- phase 2: the product, split over H


def start_gate(work: Work, refs: Refs, program) -> None:
    """Starts the copies of all this program's gate rows; nothing needs to come before."""

    def copy(split, block, piece, slot):
        at = pl.ds((split * work.pieces + piece) * COLUMNS, COLUMNS)
        plgpu.copy_gmem_to_smem(
            refs.gate.at[pl.ds(block * ROWS, ROWS), at],
            refs.scratch["gate_smem"].at[slot],
            refs.scratch["gate_arrived"].at[slot],
        )

    _for_each_piece(work, program, copy)


def multiply(work: Work, refs: Refs, tokens, program) -> None:
    """partials[split, t, block] = gate[block, split] tokens[t, split], for this program's units."""
    gate_smem, x_smem = refs.scratch["gate_smem"], refs.scratch["x_smem"]

    def copy(split, _, piece, slot):
        at = pl.ds((split * work.pieces + piece) * COLUMNS, COLUMNS)
        first = 0 * split  # not a plain 0, for which Pallas would check the bounds of [T, H]
        plgpu.copy_gmem_to_smem(
            tokens.at[pl.ds(first, work.N), at], x_smem.at[slot], refs.scratch["x_arrived"].at[slot]
        )

    _for_each_piece(work, program, copy)

    def one_unit(index, split, block):
        def sum_up(acc):
            for piece in range(work.pieces):
                slot = index * work.pieces + piece

                @pl.when(work.has_piece(split, piece))
                def _(slot=slot):
                    plgpu.barrier_wait(refs.scratch["gate_arrived"].at[slot])
                    plgpu.barrier_wait(refs.scratch["x_arrived"].at[slot])
                    plgpu.wgmma(acc, gate_smem.at[slot], x_smem.at[slot].transpose((1, 0)))

            return acc[...]  # [ROWS, N]

        sums = pl.run_scoped(sum_up, plgpu.ACC((ROWS, work.N), jnp.float32))
        out = refs.partials.at[split, :, pl.ds(block * ROWS, ROWS)].transpose((1, 0))
        out[...] = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)

    for index in range(work.units_a_program):
        exists, split, block = work.unit(program, index)
        pl.when(exists)(functools.partial(one_unit, index, split, block))


def _for_each_piece(work: Work, program, body) -> None:
    for index in range(work.units_a_program):
        exists, split, block = work.unit(program, index)
        for piece in range(work.pieces):
            pl.when(exists & work.has_piece(split, piece))(
                functools.partial(body, split, block, piece, index * work.pieces + piece)
            )


# --- phase 3: softmax and top-k


def choose(work: Work, refs: Refs, program) -> None:
    """logits, ids, weights and chosen of this program's tokens."""

    def one_token(index, _):
        token = program + index * work.num_programs
        logits = _add_partials(work, refs, token)  # [lanes]
        ranks = _rank(work, refs, logits)
        refs.scratch["logits_smem"][...] = logits
        refs.scratch["ranks_smem"][...] = ranks
        plgpu.commit_smem()
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
    itself: whatever the logits are, ranks are a permutation.
    """
    bits = lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.int32)  # no -0.0
    keys = jnp.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    keys = jnp.where(logits != logits, 0x7FC00000, keys)
    expert = plgpu.broadcasted_iota(jnp.int32, keys.shape, 0, layout=_LANE(keys.shape))
    keys = jnp.where(expert < work.E, keys, _INT32_MIN + 1)
    keys_smem = refs.scratch["keys_smem"]
    keys_smem[...] = keys
    plgpu.commit_smem()

    def count(other, ranks):
        # Against a lower index a tie is lost.
        bar = keys - jnp.where(other < expert, 1, 0)
        return ranks + jnp.where(keys_smem[other] > bar, 1, 0)

    return _unrolled(work.E, count, jnp.zeros_like(keys))


def _write_choice(work: Work, refs: Refs, token) -> None:
    """ids, weights and chosen of one token, from its logits and ranks in shared memory.

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
    plgpu.commit_smem()
    _write(refs.scratch["ids_smem"], refs.ids.at[token], work.K)
    _write(refs.scratch["weights_smem"], refs.weights.at[token], work.K)
    if work.token_tile:
        bit = jnp.where(is_chosen & (expert >> 5 == row), 1 << (expert & 31), 0)
        refs.chosen[token] = jnp.sum(bit, axis=1)


def _write(smem, gmem, count: int) -> None:
    """Copies the first `count` elements from shared to global memory."""
    if count % 8 == 0:
        layout = _LANE((count,)) if count % 128 == 0 else _FEW
        gmem[...] = plgpu.load(smem.at[pl.ds(0, count)], layout=layout, optimized=False)
    else:
        for index in range(count):
            gmem[index] = smem[index]


# --- phase 4: the Grouping


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
    plgpu.commit_smem()

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
    masks = []
    for start in range(0, work.T, 32):
        mask = jnp.zeros_like(lane)
        for token in range(start, min(start + 32, work.T)):
            chosen = refs.scratch["chosen_smem"].at[token, pl.ds(0, work.words)]
            chosen = plgpu.load(chosen, layout=_WORDS, optimized=False)
            chosen = plgpu.layout_cast(lax.broadcast_in_dim(chosen, shape, (0,)), _BITS)
            mask |= ((chosen >> lane) & 1) << (token - start)
        masks.append(mask)
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
    plgpu.commit_smem()
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
    rows = first * work.token_tile
    for index, mask in enumerate(masks):
        tokens = jnp.clip(token - 32 * index, 0, 32)
        # Shifts by 32 are not defined.
        below = jnp.where(tokens == 32, -1, (jnp.int32(1) << jnp.minimum(tokens, 31)) - 1)
        rows += _count_set_bits(mask & below)
    row_smem = refs.scratch["row_smem"]
    row_smem[...] = rows
    plgpu.commit_smem()
    for k in range(work.K):
        expert = refs.ids[token, k]
        row = row_smem[expert >> 5, expert & 31]
        refs.row_of[token, k] = row
        refs.token_of[row] = token
        refs.expert_of[row] = expert
        refs.weight_of[row] = refs.weights[token, k]


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
