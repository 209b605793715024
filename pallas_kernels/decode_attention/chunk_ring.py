"""The chunks of keys and values that a block of decode attention streams, and their softmax."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.l2_hints import copy_evict_first
from pallas_kernels.mosaic.warpgroup import add_products

HALF = 64  # keys of a stage: the rows of one wgmma
CHUNK = 2 * HALF  # keys that one step takes, because its latency is nearly that of one stage
PRODUCT = plgpu.Layout.WGMMA  # [64 keys, N], [D, N]


def splits_of(num_keys: Any, max_splits: int) -> tuple[Any, Any, Any]:
    """(chunks, chunks of a split, splits) of a row with that many keys, an int or traced.

    The last split may have fewer chunks. 4097 keys are 33 chunks: at most 32 splits are 17 of 2.
    """
    chunks = (num_keys + (CHUNK - 1)) // CHUNK
    per_split = (chunks + (max_splits - 1)) // max_splits + (chunks == 0)  # 1, to divide by
    return chunks, per_split, (chunks + per_split - 1) // per_split


@dataclasses.dataclass(frozen=True)
class Work:
    """What one block has to do, all traced.

    Attributes:
      num_keys: of the row, the new one included.
      new_slot: the new key's; -1 if there is none.
      new_split: the split that has it.
      group: of the block.
      num_groups: static.
      per_split: chunks of a split.
      num_splits: of this block.
      num_chunks: of this block's splits together.
    """

    num_keys: Any
    new_slot: Any
    new_split: Any
    group: Any
    num_groups: int
    per_split: Any
    num_splits: Any
    num_chunks: Any

    @classmethod
    def of(cls, length, valid, group, *, C: int, max_splits: int, num_groups: int) -> "Work":
        """The work of a group in a row of `length` tokens; there is a new one unless valid is 0."""
        appends, groups = valid != 0, num_groups
        num_keys = jnp.minimum(length + jnp.where(appends, 1, 0), C)
        chunks, per_split, splits = splits_of(num_keys, max_splits)
        new_slot = jnp.where(appends, lax.rem(length, C), -1)
        own = jnp.where(group < splits, lax.div(splits - 1 - group, groups) + 1, 0)
        has_last = (own > 0) & (lax.rem(splits - 1, groups) == group)
        missing = jnp.where(has_last, splits * per_split - chunks, 0)
        return cls(
            num_keys=num_keys,
            new_slot=new_slot,
            new_split=jnp.where(appends, lax.div(lax.div(new_slot, CHUNK), per_split), -1),
            group=group,
            num_groups=groups,
            per_split=per_split,
            num_splits=own,
            num_chunks=own * per_split - missing,
        )

    def first_key(self, index):
        """The slot where this block's index-th chunk begins."""
        split = self.group + lax.div(index, self.per_split) * self.num_groups
        return (split * self.per_split + lax.rem(index, self.per_split)) * CHUNK


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkRing:
    """The stages through which a block's chunks stream, half by half: keys, values, keys, ...

    With three stages, chunk 0's second half of values follows its first half of keys in stage 0.

    Attributes:
      keys, values: the cache in global memory.
      stages: shared memory.
      full: its barriers.
      work: of the block.
      first_row: of its row and kv head in the cache.
      C: rows that they have there.
      scale: of scores, which are exponents of base 2.
    """

    keys: Any
    values: Any
    stages: Any
    full: Any
    work: Work
    first_row: Any
    C: int
    scale: float

    @property
    def num_stages(self) -> int:
        return self.stages.shape[0]

    def prologue(self) -> None:
        for step in range(self.num_stages):
            self._load(0, step)

    def _load(self, index, ahead: int) -> None:
        """Starts the copy that comes `ahead` of the index-th chunk's first, if there is one."""
        cache = (self.keys, self.values)[ahead // 2 % 2]
        chunk = index + ahead // 4

        @pl.when(chunk < self.work.num_chunks)
        def _():
            # Where C ends with half a chunk, its last keys stand in for those beyond, which are
            # not visible.
            first = jnp.minimum(self.work.first_key(chunk) + ahead % 2 * HALF, self.C - HALF)
            rows = pl.ds(self.first_row + first, HALF)
            stage = self._stage(index, ahead)
            copy_evict_first(cache.at[rows], self.stages.at[stage], self.full.at[stage])

    def _stage(self, index, ahead: int):
        return lax.rem(4 * jnp.int32(index) + ahead, jnp.int32(self.num_stages))

    def step(self, q_smem, weights_smem, index, carry):
        """Adds the index-th chunk to (largest score [N], weights [64, N], sum of values [D, N]).

        Weights are those of keys 64 apart, added up. weights_smem has two parts for each half.
        """
        largest, weights, out = carry
        halves = [self._scores(q_smem, index, half) for half in range(2)]  # [64, N] each
        previous = largest
        largest = jnp.maximum(largest, jnp.max(jnp.maximum(*halves), axis=0))
        shrink = jnp.exp2(previous - largest)
        new_weights = [
            jnp.exp2(half - lax.broadcast_in_dim(largest, half.shape, (1,))) for half in halves
        ]
        weights = weights * lax.broadcast_in_dim(shrink, weights.shape, (1,))
        weights += new_weights[0] + new_weights[1]
        # The maximum has waited for all lanes, so no product reads the last chunk's weights.
        for half, pair in zip(new_weights, weights_smem, strict=True):
            high = half.astype(jnp.bfloat16)
            low = (half - high.astype(jnp.float32)).astype(jnp.bfloat16)
            for smem, part in zip(pair, (high, low), strict=True):
                part = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
                smem.transpose((1, 0))[...] = part
        plgpu.commit_smem()

        out *= lax.broadcast_in_dim(shrink, out.shape, (1,))
        factors = []
        for half, pair in enumerate(weights_smem):
            stage = self._stage(index, 2 + half)
            plgpu.barrier_wait(self.full.at[stage])
            values = self.stages.at[stage].transpose((1, 0))  # [D, 64]
            factors += [(values, smem.transpose((1, 0))) for smem in pair]
        out = add_products(out, factors)
        for half in range(2):
            self._load(index, self.num_stages + 2 + half)
        return largest, weights, out

    def _scores(self, q_smem, index, half: int) -> jax.Array:
        """[64, N] float32 of one half of the index-th chunk, -inf where no key is visible."""
        stage = self._stage(index, half)
        plgpu.barrier_wait(self.full.at[stage])
        scores = _products(self.stages.at[stage], q_smem) * self.scale
        self._load(index, self.num_stages + half)
        slot = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=PRODUCT)
        slot += self.work.first_key(index) + half * HALF
        visible = (slot < self.work.num_keys) & (slot != self.work.new_slot)
        return jnp.where(visible, scores, -jnp.inf)


def _products(k_smem, q_smem) -> jax.Array:
    """[64 keys, N] float32."""

    def multiply(acc):
        plgpu.wgmma(acc, k_smem, q_smem.transpose((1, 0)))
        return acc[...]

    accumulator = plgpu.ACC((HALF, q_smem.shape[0]), jnp.float32)
    return pl.run_scoped(multiply, accumulator)
