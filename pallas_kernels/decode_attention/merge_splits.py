"""The splits of a row's keys become its attention."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.chunk_ring import splits_of
from pallas_kernels.decode_attention.split_attention import SplitAttention
from pallas_kernels.mosaic.mailbox import Mailbox, Piece, collect, post
from pallas_kernels.mosaic.warpgroup import one_per_lane, where

# More would begin as the output projection's blocks load their weights, and wait behind them.
_MAX_BLOCKS = 256
# 4096 keys and a new one are 33 splits: two rounds. With 22 only two blocks would fit on a core.
_SPLITS_AT_ONCE = 17
_SUMS_AT_ONCE = 40  # of all heads, one register each


def _nothing(*_) -> None:
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeSplits:
    """Block (row, heads_per_block heads): attended = the splits' partials, added in order.

    Attributes:
      attention: the phase that makes the partials.
      heads_per_block: a divisor of G; None takes as few as give at most 256 blocks.
    """

    attention: SplitAttention
    heads_per_block: int | None = None

    def __post_init__(self):
        G = self.attention.G
        if self.heads_per_block is None:
            rows, heads = self.attention.B, self.attention.heads
            divisors = [count for count in range(1, G + 1) if G % count == 0]
            fitting = [count for count in divisors if rows * heads // count <= _MAX_BLOCKS]
            object.__setattr__(self, "heads_per_block", fitting[0] if fitting else G)
        if G % self.heads_per_block:
            raise ValueError(
                f"heads_per_block is {self.heads_per_block}; expected a divisor of G = {G}"
            )

    @property
    def blocks_per_pair(self) -> int:
        """Blocks for each row and kv head."""
        return self.attention.G // self.heads_per_block

    @property
    def num_blocks(self) -> int:
        return self.attention.B * self.attention.kv * self.blocks_per_pair

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        phase = self.attention
        return jax.ShapeDtypeStruct((phase.B, phase.heads * phase.D), jnp.bfloat16)

    def run(
        self, block_id, sums, log_weights, lengths, valid, attended,
        wait: Callable[[Any], None] = _nothing,
        signal: Callable[[], None] = _nothing,
    ) -> None:  # fmt: skip
        """All of one block; at the end it calls signal().

        Args:
          block_id: among the blocks of this kind.
          sums: see SplitAttention.out_types.
          log_weights: likewise.
          lengths: [B] int32, as SplitAttention takes them.
          valid: likewise.
          attended: [B, heads * D], written; zeros in a row without any key. A bf16 ref, or a
            Mailbox.
          wait: once wait(row * kv + kv head) returns, sums and log_weights may be read.
          signal: called once.
        """
        phase = self.attention
        pair, part = (
            lax.div(block_id, self.blocks_per_pair),
            lax.rem(block_id, self.blocks_per_pair),
        )
        row, kv_head = lax.div(pair, phase.kv), lax.rem(pair, phase.kv)
        appended = jnp.where(valid[row] != 0, 1, 0)
        _, _, splits = splits_of(jnp.minimum(lengths[row] + appended, phase.C), phase.max_splits)
        wait(pair)

        at_once = self._heads_at_once

        def some_heads(index, _):
            first = part * self.heads_per_block + index * at_once
            heads = [first + ahead for ahead in range(at_once)]
            merged = _merge(sums.at[pair], log_weights.at[pair], heads, splits)
            for head, of_head in zip(heads, merged, strict=True):
                columns = (kv_head * phase.G + head) * phase.D
                place = attended.at[row, pl.ds(columns, phase.D)]
                if isinstance(place, Mailbox):
                    post(place, of_head, one_per_lane(phase.D))
                else:
                    place[...] = of_head.astype(jnp.bfloat16)

        lax.fori_loop(0, self.heads_per_block // at_once, some_heads, None)
        signal()

    @property
    def _heads_at_once(self) -> int:
        """A divisor of heads_per_block."""
        several = min(_SPLITS_AT_ONCE, self.attention.splits)
        return next(
            count
            for count in range(self.heads_per_block, 0, -1)
            if self.heads_per_block % count == 0
            and (count == 1 or count * several <= _SUMS_AT_ONCE)
        )


def _merge(sums, log_weights, heads: Sequence[Any], splits) -> list[jax.Array]:
    """For each head [D] float32, one element a lane: the mean of its first sums, by weight.

    Loads of several splits and of all heads are under way at once. Where fewer splits are left, the
    last one is read again.
    """
    several = min(_SPLITS_AT_ONCE, sums.shape[0])
    D = sums.shape[-1]

    def add(index, carry):
        numbers = [index * several + ahead for ahead in range(several)]
        places = [jnp.minimum(split, splits - 1) for split in numbers]
        wanted = list(itertools.product(heads, places))
        parts = [Piece(sums.at[place, head], one_per_lane(D)) for head, place in wanted]
        found = collect(
            [*parts, *(Piece(log_weights.at[place, head], None) for head, place in wanted)]
        )
        by_head = zip(
            itertools.batched(found[: len(wanted)], several),
            itertools.batched(found[len(wanted) :], several),
            carry,
            strict=True,
        )
        there = [split < splits for split in numbers]
        return [_add_splits(there, *of_head) for of_head in by_head]

    zeros = plgpu.layout_cast(jnp.zeros((D,), jnp.float32), one_per_lane(D))
    nothing = jnp.float32(-jnp.inf), jnp.float32(0), zeros
    rounds = (splits + several - 1) // several
    carry = lax.fori_loop(0, rounds, add, [nothing] * len(heads))
    return [where(splits > 0, out / total, 0.0) for _, total, out in carry]


def _add_splits(there, parts, log_weights, carry):
    """A head's (largest base-2 logarithm, sum of weights, weighted sum [D]) with some splits more.

    Args:
      there: of each split whether it counts; one that does not is another one's repeat.
      parts: of each split [D].
      log_weights: of each split.
      carry: without them.
    """
    previous, total, out = carry
    largest = functools.reduce(jnp.maximum, log_weights, previous)
    shrink = jnp.exp2(previous - largest)
    total, out = total * shrink, out * shrink
    for counts, log_weight, part in zip(there, log_weights, parts, strict=True):
        weight = jnp.where(counts, jnp.exp2(log_weight - largest), 0.0)
        total, out = total + weight, out + weight * part
    return largest, total, out
