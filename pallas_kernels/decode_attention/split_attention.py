"""One decode step's attention over the cache: a row's keys in splits, merged in a fixed order.

    attention   block (row, kv head, group)   partials of the splits group, group + num_groups, ...
    merge       block (row, some heads)       attended = weighted sum of the splits' partials

A row with n keys in 64-key chunks has at most 32 splits of equally many chunks. That depends on n
alone, so a row's bits depend neither on its neighbours nor on how many blocks share its splits:

    n     1 to 64   500          2048          2049                       16384
          1 x 64    8 x 1 chunk  32 x 1 chunk  17 x 2 (the last has one)  32 x 8

Queries, new keys and new values come as float32 partial sums of their products with x. A block adds
them, norms and turns them (RMSNorm, RoPE), and rounds to bf16 once.

The G query heads of a kv head are too few rows for the tensor cores' M = 64, so both products are
turned around ("swap-AB"): keys are rows of the first, a value's elements those of the second, and
heads are N columns, a multiple of 8. Columns do not mix. Weights are split bf16 in the second
product, a high and a low half, because rounded ones would add an error as large as the output's.

The new key is no row of a loaded chunk. Its score is computed in registers and begins the softmax
of the split that has its slot, and the slot is masked in the chunk. So every chunk is on its way
before a block waits for the products, and the cache is written once the split has been read.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.chunk_ring import CHUNK, HALF, PRODUCT, ChunkRing, Work
from pallas_kernels.decode_attention.new_token import HEAD_SIZE, ROWS, Constants, prepare
from pallas_kernels.mosaic.mailbox import Mailbox, Piece, empty, post
from pallas_kernels.mosaic.operands import wgmma_operand
from pallas_kernels.mosaic.warpgroup import one_per_lane, where

MAX_GROUP = 64  # query heads of a kv head
_HEADS = PRODUCT.reduce(0)
_BLOCKS_AT_ONCE = 396  # of a row, kv head and group: what a Hopper's cores take at once


def _nothing(*_) -> None:
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitAttention:
    """Block (row, kv head, group): the partials of every num_groups-th split of a row's keys.

    Attributes:
      B: rows.
      heads: query heads; a multiple of kv, at most 64 times as many.
      kv: key and value heads.
      C: slots of a row's cache, a multiple of 64.
      num_partials: partial sums of qkv.
      eps: of the norms of queries and keys.
      D: the head's size; 128.
      max_splits: of a row; a part of the contract on bits.
      num_groups: blocks of a row and kv head; None takes one for each split, or as many as run at
        once.
      num_stages: of the ring, 16 KB each: a chunk's keys in halves, its values, the next keys, ...
        None takes as many as leave room for three blocks on a core.
    """

    B: int
    heads: int
    kv: int
    C: int
    num_partials: int
    eps: float
    D: int = HEAD_SIZE
    max_splits: int = 64
    num_groups: int | None = None
    num_stages: int | None = None

    def __post_init__(self):
        if self.D != HEAD_SIZE:
            raise NotImplementedError(f"D is {self.D}; decode attention takes {HEAD_SIZE}")
        if self.C % HALF or self.C < HALF:
            raise ValueError(f"C is {self.C}; expected a multiple of {HALF}")
        if self.heads % self.kv:
            raise ValueError(f"heads is {self.heads}; expected a multiple of kv = {self.kv}")
        if self.G > MAX_GROUP:
            raise NotImplementedError(
                f"heads is {self.heads} for {self.kv} kv heads; decode attention takes up to "
                f"{MAX_GROUP} heads a kv head"
            )
        if self.num_groups is None:
            object.__setattr__(self, "num_groups", _default_groups(self.B * self.kv, self.splits))
        if self.num_stages is None:
            object.__setattr__(self, "num_stages", 4 if self.N == ROWS else 3)

    @property
    def G(self) -> int:
        """Query heads of a kv head."""
        return self.heads // self.kv

    @property
    def N(self) -> int:
        """Columns of the products: G, rounded up to a multiple of 8."""
        return -(-self.G // ROWS) * ROWS

    @property
    def splits(self) -> int:
        """The most that a row can have in C slots."""
        return min(self.max_splits, -(-self.C // CHUNK))

    @property
    def num_blocks(self) -> int:
        return self.num_groups * self.B * self.kv

    @property
    def out_types(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Each split's normalised sums of values, and the base-2 logarithms of its sums of weights.

        [B * kv, splits, N, D] and [B * kv, splits, N] float32; splits that a row does not have, and
        heads from G on, hold anything.
        """
        splits = (self.B * self.kv, self.splits)
        return (
            jax.ShapeDtypeStruct((*splits, self.N, self.D), jnp.float32),
            jax.ShapeDtypeStruct((*splits, self.N), jnp.float32),
        )

    def shared_types(self) -> list:
        """The ring, queries, a chunk's weights, the new key's scores, and it and its value."""
        return [
            wgmma_operand(self.num_stages, HALF, self.D),
            wgmma_operand(self.N, self.D),
            [[wgmma_operand(self.N, HALF) for _ in range(2)] for _ in range(2)],
            plgpu.SMEM((self.N,), jnp.float32),
            plgpu.SMEM((2, self.D), jnp.float32),
        ]

    def full_type(self):
        return plgpu.Barrier(num_barriers=self.num_stages)

    def run(
        self, block_id, qkv, cos, sin, q_norm, k_norm, lengths, valid, keys, values,
        sums, log_weights, shared, full,
        wait: Callable[[], None] = _nothing,
        signal: Callable[[Any], None] = _nothing,
        squares: Piece | None = None,
        factor: Callable[[jax.Array], Any] = _nothing,
    ) -> None:  # fmt: skip
        """All of one block; at the end it calls signal(row * kv + kv head).

        Args:
          block_id: among the blocks of this kind.
          qkv: [num_partials, at least B, heads + 2 kv, D] float32, partial sums: query heads, keys,
            values.
          cos: [B, D] float32, of each row's position.
          sin: likewise.
          q_norm: [D] bf16, the weight of the queries' norm.
          k_norm: likewise, of the keys'.
          lengths: [B] int32, tokens of each row before this one.
          valid: [B] int32; a row where it is 0 appends nothing.
          keys: [B * kv * C, D] bf16, the cache; the new key is written to slot lengths % C.
          values: likewise.
          sums: written, see out_types.
          log_weights: likewise.
          shared: see shared_types.
          full: see full_type.
          wait: once wait() returns, qkv may be read.
          signal: called once.
          squares: what is collected with qkv, for the factor; or None.
          factor: factor(squares) is what the row's sums are multiplied with.
        """
        # Groups come last, because the first ones have splits in each row.
        pair, group = lax.rem(block_id, self.B * self.kv), lax.div(block_id, self.B * self.kv)
        row, kv_head = lax.div(pair, self.kv), lax.rem(pair, self.kv)
        stages, q_smem, weights_smem, scores_smem, new_smem = shared
        work = Work.of(
            lengths[row], valid[row], group,
            C=self.C, max_splits=self.max_splits, num_groups=self.num_groups,
        )  # fmt: skip
        scale = self.D**-0.5 * math.log2(math.e)
        ring = ChunkRing(
            keys=keys, values=values, stages=stages, full=full, work=work,
            first_row=pair * self.C, C=self.C, scale=scale,
        )  # fmt: skip
        ring.prologue()
        constants = Constants.load(cos.at[row], sin.at[row], q_norm, k_norm)
        wait()

        @pl.when(work.num_splits > 0)
        def _():
            parts = [qkv.at[partial, row] for partial in range(self.num_partials)]
            prepare(
                parts, squares, factor, kv_head, constants, q_smem, scores_smem, new_smem,
                heads=self.heads, kv=self.kv, eps=self.eps, scale=scale,
            )  # fmt: skip
            scores = plgpu.load(scores_smem, layout=_HEADS, optimized=False)  # [N]

            def one_split(index, _):
                split = group + index * self.num_groups
                has_new = split == work.new_split
                value = plgpu.load(new_smem.at[1], layout=PRODUCT.reduce(1), optimized=False)
                value = lax.broadcast_in_dim(value, (self.D, self.N), (0,))
                # Weights are added over keys at the end; the new key's 1 is spread over all.
                spread = jnp.full((HALF, self.N), 1 / HALF, jnp.float32)
                spread = plgpu.layout_cast(spread, PRODUCT)
                carry = (
                    where(has_new, scores, -jnp.inf),
                    where(has_new, spread, 0.0),
                    where(has_new, value, 0.0),
                )
                first = index * work.per_split
                largest, weights, out = lax.fori_loop(
                    first,
                    jnp.minimum(first + work.per_split, work.num_chunks),
                    functools.partial(ring.step, q_smem, weights_smem),
                    carry,
                )
                total = jnp.sum(weights, axis=0)  # [N]
                log_weight = largest + jnp.log(total) * math.log2(math.e)
                post(log_weights.at[pair, split], log_weight, _HEADS)
                out /= lax.broadcast_in_dim(total, out.shape, (1,))
                post(sums.at[pair, split], out, PRODUCT, transposed=True)

                @pl.when(has_new)
                def _():
                    for cache, new in ((keys, new_smem.at[0]), (values, new_smem.at[1])):
                        new = plgpu.load(new, layout=one_per_lane(self.D))
                        cache[pair * self.C + work.new_slot] = new.astype(jnp.bfloat16)

            lax.fori_loop(0, work.num_splits, one_split, None)

        if isinstance(sums, Mailbox):
            # The launch before may have had more splits.
            def no_split(index, _):
                split = group + index * self.num_groups
                empty(log_weights.at[pair, split], (self.N,), _HEADS)
                empty(sums.at[pair, split], (self.D, self.N), PRODUCT, transposed=True)

            places = lax.div(self.splits - 1 - group, jnp.int32(self.num_groups)) + 1
            lax.fori_loop(work.num_splits, places, no_split, None)
        signal(pair)


def _default_groups(pairs: int, splits: int) -> int:
    """As many as run at once: of 5 splits of 128 pairs each block takes 2, so there are 3 groups.

    A few blocks more would run after all others, and take as long again.
    """
    splits_of_a_block = -(-splits // max(1, _BLOCKS_AT_ONCE // pairs))
    return -(-splits // splits_of_a_block)
