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

CHUNK = 64  # keys that one step takes: the rows of one wgmma
PRODUCT = plgpu.Layout.WGMMA  # [64 keys, N], [D, N]


def splits_of(num_keys: Any, max_splits: int) -> tuple[Any, Any, Any]:
    """(chunks, chunks of a split, splits) of a row with that many keys, an int or traced.

    The last split may have fewer chunks. 2049 keys are 33 chunks: at most 32 splits are 17 of 2.
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
    """The stages through which a block's chunks stream: keys, values, keys, values, ...

    With three stages, chunk 1's values follow chunk 0's keys in stage 0. Half a chunk a stage
    leaves room for three blocks on a core.

    Attributes:
      keys, values: the cache in global memory.
      stages: shared memory.
      full: its barriers.
      work: of the block.
      first_row: of its row and kv head in the cache.
      scale: of scores, which are exponents of base 2.
    """

    keys: Any
    values: Any
    stages: Any
    full: Any
    work: Work
    first_row: Any
    scale: float

    @property
    def num_stages(self) -> int:
        return self.stages.shape[0]

    def prologue(self) -> None:
        for step in range(self.num_stages):
            self._load(0, step)

    def _load(self, index, ahead: int) -> None:
        """Starts the copy that comes `ahead` of the index-th chunk's keys, if there is one."""
        cache = (self.keys, self.values)[ahead % 2]
        chunk = index + ahead // 2

        @pl.when(chunk < self.work.num_chunks)
        def _():
            rows = pl.ds(self.first_row + self.work.first_key(chunk), CHUNK)
            stage = self._stage(index, ahead)
            copy_evict_first(cache.at[rows], self.stages.at[stage], self.full.at[stage])

    def _stage(self, index, ahead: int):
        return lax.rem(2 * jnp.int32(index) + ahead, jnp.int32(self.num_stages))

    def step(self, q_smem, weights_smem, index, carry):
        """Adds the index-th chunk to (largest score [N], weights [64, N], sum of values [D, N])."""
        largest, weights, out = carry
        stage = self._stage(index, 0)
        plgpu.barrier_wait(self.full.at[stage])
        scores = _products(self.stages.at[stage], q_smem) * self.scale  # [64, N]
        self._load(index, self.num_stages)
        slot = self.work.first_key(index) + plgpu.broadcasted_iota(
            jnp.int32, scores.shape, 0, layout=PRODUCT
        )
        visible = (slot < self.work.num_keys) & (slot != self.work.new_slot)
        scores = jnp.where(visible, scores, -jnp.inf)

        previous, largest = largest, jnp.maximum(largest, jnp.max(scores, axis=0))
        shrink = jnp.exp2(previous - largest)
        new_weights = jnp.exp2(scores - lax.broadcast_in_dim(largest, scores.shape, (1,)))
        weights = weights * lax.broadcast_in_dim(shrink, weights.shape, (1,)) + new_weights
        # The maximum has waited for all lanes, so no product reads the last chunk's weights.
        high = new_weights.astype(jnp.bfloat16)
        low = (new_weights - high.astype(jnp.float32)).astype(jnp.bfloat16)
        for smem, part in zip(weights_smem, (high, low), strict=True):
            part = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
            smem.transpose((1, 0))[...] = part
        plgpu.commit_smem()

        stage = self._stage(index, 1)
        plgpu.barrier_wait(self.full.at[stage])
        out *= lax.broadcast_in_dim(shrink, out.shape, (1,))
        values = self.stages.at[stage].transpose((1, 0))  # [D, 64]
        out = add_products(out, [(values, smem.transpose((1, 0))) for smem in weights_smem])
        self._load(index, self.num_stages + 1)
        return largest, weights, out


def _products(k_smem, q_smem) -> jax.Array:
    """[64 keys, N] float32."""

    def multiply(acc):
        plgpu.wgmma(acc, k_smem, q_smem.transpose((1, 0)))
        return acc[...]

    accumulator = plgpu.ACC((CHUNK, q_smem.shape[0]), jnp.float32)
    return pl.run_scoped(multiply, accumulator)
