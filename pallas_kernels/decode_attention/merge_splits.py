"""The splits of a row's keys become its attention."""

import dataclasses
from collections.abc import Callable
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

_MAX_BLOCKS = 512
# 4096 keys and a new one are 33 splits: two rounds. With 22 only two blocks would fit on a core.
_SPLITS_AT_ONCE = 17


def _nothing(*_) -> None:
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeSplits:
    """Block (row, heads_per_block heads): attended = the splits' partials, added in order.

    Attributes:
      attention: the phase that makes the partials.
      heads_per_block: a divisor of G; None takes as few as give at most 512 blocks.
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

        def one_head(index, _):
            head = part * self.heads_per_block + index
            merged = _merge(sums.at[pair], log_weights.at[pair], head, splits)
            columns = (kv_head * phase.G + head) * phase.D
            place = attended.at[row, pl.ds(columns, phase.D)]
            if isinstance(place, Mailbox):
                post(place, merged, one_per_lane(phase.D))
            else:
                place[...] = merged.astype(jnp.bfloat16)

        lax.fori_loop(0, self.heads_per_block, one_head, None)
        signal()


def _merge(sums, log_weights, head, splits) -> jax.Array:
    """[D] float32, one element a lane: the mean of the first `splits` sums of a head, by weight.

    Loads of several splits are under way at once. Where fewer are left, the last one is read again.
    """
    several = min(_SPLITS_AT_ONCE, sums.shape[0])

    def add(index, carry):
        largest, total, out = carry
        numbers = [index * several + ahead for ahead in range(several)]
        places = [jnp.minimum(split, splits - 1) for split in numbers]
        parts = [Piece(sums.at[place, head], one_per_lane(sums.shape[-1])) for place in places]
        found = collect([*parts, *(Piece(log_weights.at[place, head], None) for place in places)])
        loaded = [
            (split < splits, log_weight, part)
            for split, part, log_weight in zip(
                numbers, found[:several], found[several:], strict=True
            )
        ]
        previous = largest
        for _, log_weight, _ in loaded:
            largest = jnp.maximum(largest, log_weight)
        shrink = jnp.exp2(previous - largest)
        total, out = total * shrink, out * shrink
        for there, log_weight, part in loaded:
            weight = jnp.where(there, jnp.exp2(log_weight - largest), 0.0)
            total, out = total + weight, out + weight * part
        return largest, total, out

    zeros = plgpu.layout_cast(
        jnp.zeros((sums.shape[-1],), jnp.float32), one_per_lane(sums.shape[-1])
    )
    carry = jnp.float32(-jnp.inf), jnp.float32(0), zeros
    rounds = (splits + several - 1) // several
    _, total, out = lax.fori_loop(0, rounds, add, carry)
    return where(splits > 0, out / total, 0.0)
