"""Both phases of decode attention in one grid."""

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl

from pallas_kernels.decode_attention.merge_splits import MergeSplits
from pallas_kernels.decode_attention.split_attention import SplitAttention
from pallas_kernels.mosaic.device import launch
from pallas_kernels.mosaic.grid_sync import signal, wait, zeroed_counters


@functools.partial(
    jax.jit, static_argnames=("eps", "max_splits", "num_groups", "heads_per_block", "interpret")
)
def attend(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    q_norm: jax.Array,
    k_norm: jax.Array,
    lengths: jax.Array,
    valid: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    eps: float = 1e-6,
    max_splits: int = 32,
    num_groups: int | None = None,
    heads_per_block: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of one new token a row to the cache, which gets its key and value.

    Args:
      qkv: [P, at least B, heads + 2 kv, D] float32, partial sums: query heads, keys, values.
      cos: [B, D] float32, of each row's position.
      sin: likewise.
      q_norm: [D] bf16, the weight of an RMSNorm of each query head.
      k_norm: likewise, of the key.
      lengths: [B] int32, tokens of each row before this one.
      valid: [B] int32; a row where it is 0 has ended and appends nothing.
      keys: [B, kv, C, D] bf16; slot t % C holds token t.
      values: likewise.
      eps: of the norms.
      max_splits: see SplitAttention.
      num_groups: likewise.
      heads_per_block: see MergeSplits.
      interpret: as in device.launch.

    Returns:
      attended [B, heads * D] bf16, and keys and values with the new ones.
    """
    B, kv, C, D = keys.shape
    heads = qkv.shape[2] - 2 * kv
    attention = SplitAttention(
        B=B,
        heads=heads,
        kv=kv,
        C=C,
        D=D,
        num_partials=qkv.shape[0],
        eps=eps,
        max_splits=max_splits,
        num_groups=num_groups,
    )
    merge = MergeSplits(attention=attention, heads_per_block=heads_per_block)

    def kernel(
        block_id, qkv, cos, sin, q_norm, k_norm, lengths, valid, _, __, counters,
        keys, values, sums, log_weights, attended, *scratch,
    ):  # fmt: skip
        *shared, full = scratch

        @pl.when(block_id < attention.num_blocks)
        def _():
            attention.run(
                block_id, qkv, cos, sin, q_norm, k_norm, lengths, valid, keys, values,
                sums, log_weights, shared, full,
                signal=functools.partial(signal, counters),
            )  # fmt: skip

        block_id -= attention.num_blocks

        def wait_for_pair(pair):
            wait(counters, pair, attention.num_groups, merge.blocks_per_pair)

        @pl.when(block_id >= 0)
        def _():
            merge.run(block_id, sums, log_weights, lengths, valid, attended, wait_for_pair)

    @jax.custom_batching.sequential_vmap  # the counters are for one call at a time
    def call(*operands):
        *_, keys, values = operands
        return launch(
            kernel,
            name="decode_attention",
            num_blocks=attention.num_blocks + merge.num_blocks,
            out_type=[*map(jax.typeof, (keys, values)), *attention.out_types, merge.out_type],
            scratch_types=[*attention.shared_types(), attention.full_type()],
            in_place={7: 0, 8: 1},
            interpret=interpret,
        )(*operands, zeroed_counters(B * kv))

    flat = keys.reshape(-1, D), values.reshape(-1, D)
    new_keys, new_values, _, _, attended = call(
        qkv, cos, sin, q_norm, k_norm, lengths, valid, *flat
    )
    return attended, new_keys.reshape(keys.shape), new_values.reshape(values.shape)
