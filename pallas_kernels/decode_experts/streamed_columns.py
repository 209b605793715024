"""Which tokens are the columns of an expert's products, for the streamed layout.

A tile is N columns of one expert; tiles are ordered by expert. Two ways to fill them:

    EveryToken     T <= 8:  one tile for each unique expert, whose columns are all tokens, whether
                   routed there or not. No rows are moved, and each program of the kernel finds the
                   unique experts by itself from the ids.
    RoutedTokens   T > 8:   the tiles of a Grouping, rows gathered by XLA ahead of the kernel.

Both add a token's experts in ascending order of their ids, starting from zero, so that a token gets
the same bits either way.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_experts.grouping import group, tile_capacity

ROWS = 64  # rows of weights that one wgmma takes
_LANES = 128
_ALONG_TOKENS = plgpu.Layout.WGMMA.reduce(0)
_ALONG_ROWS = plgpu.Layout.WGMMA.reduce(1)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _one_a_lane(length: int):
    return plgpu.Layout.WG_STRIDED((length,), 1)


def _lanes(length: int) -> jax.Array:
    """[length]: each element's index."""
    return plgpu.broadcasted_iota(jnp.int32, (length,), 0, layout=_one_a_lane(length))


def _column_index(N: int) -> jax.Array:
    """[ROWS, N]: each element's column."""
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, N), 1, layout=plgpu.Layout.WGMMA)


@dataclasses.dataclass(frozen=True)
class EveryToken:
    """All T <= 8 tokens are the columns of each unique expert."""

    T: int
    K: int
    E: int

    N = 8
    # Down products computed at once, in batches of so many tiles at most. With few tiles their
    # latency is most of what follows the barrier; with many it hides behind the copies, and slots
    # are better refilled one by one.
    at_once, at_once_up_to = 4, 16

    @property
    def most_tiles(self) -> int:
        return min(self.T * self.K, self.E)

    @property
    def rows(self) -> int:
        """Rows of the partial sums."""
        return self.N

    def arrays(self, x, expert_ids, expert_weights, interpret) -> tuple[jax.Array, ...]:
        """What the kernel reads: the rows that are multiplied, and what says whose they are."""
        if interpret:  # on a GPU the copy engine fills rows past the end with zeros
            x = jnp.pad(x, ((0, self.N - self.T), (0, 0)))
        return x, (expert_ids, expert_weights)

    def scratch_types(self) -> list[Any]:
        length = _round_up(self.most_tiles, _LANES)
        return [plgpu.SMEM((length,), jnp.int32), plgpu.SMEM((length,), jnp.int32)]

    def accumulator_types(self) -> list[Any]:
        return []

    def find_tiles(self, arrays, scratch) -> jax.Array:
        """Fills the table of unique experts; returns their number."""
        ids_gmem, _ = arrays
        experts_smem, _ = scratch
        find = self._words_by_scalars if self.T * self.K <= 32 else self._words_by_lanes
        words = find(ids_gmem)
        lanes = _lanes(experts_smem.shape[0])
        experts_smem[...], count = _nth_set_bits(words, lanes)
        plgpu.commit_smem()
        return count

    def _words_by_scalars(self, ids_gmem) -> list[jax.Array]:
        """Bit e % 32 of word e // 32 is set if anybody is routed to expert e."""
        words = [jnp.int32(0)] * -(-self.E // 32)
        for t in range(self.T):
            for k in range(self.K):
                expert = ids_gmem[t, k]
                bit = jnp.where((expert >= 0) & (expert < self.E), jnp.int32(1) << (expert & 31), 0)
                for index, word in enumerate(words):
                    words[index] = word | jnp.where(expert >> 5 == index, bit, 0)
        return words

    def _words_by_lanes(self, ids_gmem) -> list[jax.Array]:
        """The same; each lane looks for its own expert, so that an id costs two instructions."""
        lanes = _lanes(_round_up(self.E, _LANES))

        def body(t, bits):
            for k in range(self.K):
                bits = jnp.where(lanes == ids_gmem[t, k], 1 << (lanes & 31), bits)
            return bits

        bits = lax.fori_loop(0, self.T, body, jnp.zeros_like(lanes))
        bits = jnp.where(lanes < self.E, bits, 0)
        return [jnp.sum(jnp.where(lanes >> 5 == w, bits, 0)) for w in range(-(-self.E // 32))]

    def find_tokens(self, arrays, scratch) -> None:
        """Fills the table of each unique expert's tokens: bit t is set if t is routed there."""
        ids_gmem, _ = arrays
        experts_smem, tokens_smem = scratch
        experts = plgpu.load(experts_smem, layout=_one_a_lane(experts_smem.shape[0]))

        def body(t, tokens):
            for k in range(self.K):
                tokens |= jnp.where(experts == ids_gmem[t, k], jnp.int32(1) << t, jnp.int32(0))
            return tokens

        tokens_smem[...] = lax.fori_loop(0, self.T, body, jnp.zeros_like(experts))
        plgpu.commit_smem()

    def expert(self, scratch, tile) -> jax.Array:
        return scratch[0][tile]

    def first_row(self, tile) -> jax.Array:
        return 0 * tile  # not a plain 0, for which Pallas would check x's bounds (see arrays)

    def routing_weights(self, arrays, scratch, tile) -> jax.Array:
        """[ROWS, N] float32: each column's routing weight; a repeated expert's ones are added."""
        ids_gmem, weights_gmem = arrays
        expert = self.expert(scratch, tile)
        column = _column_index(self.N)

        def body(t, out):
            total = jnp.float32(0)
            for k in range(self.K):
                total += jnp.where(ids_gmem[t, k] == expert, weights_gmem[t, k], jnp.float32(0))
            return jnp.where(column == t, total, out)

        return lax.fori_loop(0, self.T, body, jnp.zeros_like(column, jnp.float32))

    def zero(self, sums):
        del sums
        return _zeros(self.N)

    def add(self, sums, carry, arrays, scratch, tile, product):
        """Adds a tile's product [ROWS, N] for the tokens that are routed there."""
        del sums, arrays
        routed = (scratch[1][tile] >> _column_index(self.N)) & 1
        # Select, never multiply by zero: an inf in the weights is no business of the others.
        return jnp.where(routed == 1, carry + product, carry)

    def write(self, sums, carry, partial_gmem) -> None:
        """Writes the sums into partial_gmem [rows, ROWS]."""
        del sums
        carry = plgpu.layout_cast(carry, plgpu.Layout.WGMMA_TRANSPOSED)
        partial_gmem.transpose((1, 0))[...] = carry


@dataclasses.dataclass(frozen=True)
class RoutedTokens:
    """Each expert's columns are the tokens routed there, in tiles of 8."""

    T: int
    K: int
    E: int

    N = 8
    at_once, at_once_up_to = 2, 2**30  # adding to shared memory takes longer: it always shows

    @property
    def most_tiles(self) -> int:
        return tile_capacity(self.T, self.K, self.E, self.N)

    @property
    def rows(self) -> int:
        return _round_up(self.T, 8)

    def arrays(self, x, expert_ids, expert_weights, interpret) -> tuple[jax.Array, ...]:
        del interpret
        # Computed once, or XLA would do it again inside each of group's reductions.
        merged = lax.optimization_barrier(_merge_repeated(expert_ids, expert_weights))
        length = _round_up(self.most_tiles, _LANES // self.N)
        grouping = group(*merged, self.E, token_tile=self.N, num_tiles=length)
        rows = x[jnp.maximum(grouping.token_of, 0)]  # [P, H]; an unowned row's column is not read
        return rows, (grouping.expert_of, grouping.token_of, grouping.weight_of)

    def scratch_types(self) -> list[Any]:
        rows = _round_up(self.most_tiles * self.N, _LANES)
        return [plgpu.SMEM((rows,), jnp.int32), plgpu.SMEM((rows,), jnp.int32)]

    def accumulator_types(self) -> list[Any]:
        # The sums, one row more for the columns that nobody owns, and a tile's products.
        return [
            plgpu.SMEM((self.rows + 1, ROWS), jnp.float32),
            plgpu.SMEM((self.N, ROWS), jnp.float32),
        ]

    def find_tiles(self, arrays, scratch) -> jax.Array:
        rows = scratch[0].shape[0]
        expert_of = plgpu.load(arrays[0], layout=_one_a_lane(rows))
        scratch[0][...] = expert_of
        plgpu.commit_smem()
        first_of_tile = _lanes(rows) & (self.N - 1) == 0
        return jnp.sum(jnp.where(first_of_tile & (expert_of >= 0), jnp.int32(1), jnp.int32(0)))

    def find_tokens(self, arrays, scratch) -> None:
        tokens_gmem = arrays[1]
        layout = _one_a_lane(tokens_gmem.shape[0])
        scratch[1][...] = plgpu.load(tokens_gmem, layout=layout)
        plgpu.commit_smem()

    def expert(self, scratch, tile) -> jax.Array:
        return scratch[0][tile * self.N]

    def first_row(self, tile) -> jax.Array:
        return tile * self.N

    def routing_weights(self, arrays, scratch, tile) -> jax.Array:
        del scratch
        weights_gmem = arrays[2].at[pl.ds(tile * self.N, self.N)]
        weights = plgpu.load(weights_gmem, layout=_ALONG_TOKENS, optimized=False)
        return lax.broadcast_in_dim(weights, (ROWS, self.N), (1,))

    def zero(self, sums):
        sums_smem, _ = sums
        row = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), _ALONG_ROWS)

        def body(token, _):
            sums_smem[token] = row
            return ()

        return lax.fori_loop(0, self.rows, body, ())

    def add(self, sums, carry, arrays, scratch, tile, product):
        del arrays
        sums_smem, product_smem = sums
        product = plgpu.layout_cast(product, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()  # every lane has read the tile before
        product_smem.transpose((1, 0))[...] = product
        plgpu.commit_smem()
        # A tile holds a token once, so that all loads may come before the first store.
        new = []
        for c in range(self.N):
            token = scratch[1][tile * self.N + c]
            token = jnp.where(token >= 0, token, self.rows)
            old = plgpu.load(sums_smem.at[token], layout=_ALONG_ROWS, optimized=False)
            one = plgpu.load(product_smem.at[c], layout=_ALONG_ROWS, optimized=False)
            new.append((token, old + one))
        for token, row in new:
            sums_smem[token] = row
        return carry

    def write(self, sums, carry, partial_gmem) -> None:
        del carry
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums[0].at[pl.ds(0, self.rows)], partial_gmem)
        plgpu.wait_smem_to_gmem(0)


def _merge_repeated(expert_ids, expert_weights) -> tuple[jax.Array, jax.Array]:
    """Gives a token that names an expert twice one assignment with the sum of the weights."""
    T, K = expert_ids.shape
    # Elementwise on [T, 1] columns, and not reduced over [T, K, K]: a kernel less.
    ids = [expert_ids[:, k, None] for k in range(K)]
    weights = [expert_weights[:, k, None] for k in range(K)]
    merged, totals = [], []
    for k in range(K):
        total, repeats = jnp.zeros((T, 1), jnp.float32), jnp.zeros((T, 1), bool)
        for other in range(K):
            same = ids[k] == ids[other]
            total += jnp.where(same, weights[other], 0)
            repeats |= same if other < k else False
        merged.append(jnp.where(repeats, -1, ids[k]))
        totals.append(total)
    return jnp.concatenate(merged, axis=1), jnp.concatenate(totals, axis=1)


def _zeros(N: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((ROWS, N), jnp.float32), plgpu.Layout.WGMMA)


def _count_set_bits(word):
    """How many bits of an int32 are set, of a scalar or of each element."""
    # What an arithmetic shift brings in at the top, the masks take away.
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24


def _nth_set_bits(words, n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The position of the n-th set bit, n counted from 0, for each element of n; and their number.

    Elements of n that are not below that number get some position.
    """
    word, position = jnp.zeros_like(n), jnp.zeros_like(n)
    below = jnp.int32(0)
    rank = n
    for index, this_word in enumerate(words):
        here = n >= below
        word = jnp.where(here, this_word, word)
        rank = jnp.where(here, n - below, rank)
        position = jnp.where(here, jnp.int32(32 * index), position)
        below += _count_set_bits(this_word)
    for width in (16, 8, 4, 2, 1):
        count = _count_set_bits(word & ((1 << width) - 1))
        upper = rank >= count
        rank = jnp.where(upper, rank - count, rank)
        word = jnp.where(upper, word >> width, word)
        position = jnp.where(upper, position + width, position)
    return position, below
