"""What a layer's decode step means, in plain float32 jnp: the oracle of decode_layer.

1. x = residual.x + its parts.
2. q, k, v = W normed, normed = RMSNorm(x). RMSNorm of q and k over D, then RoPE.
3. k and v go to slot lengths mod C of a valid row's cache, in the cache's dtype.
4. a = softmax(q k^T / sqrt(D)) v over the min(lengths + valid, C) slots in use; zeros if none is.
5. x = x + W_o a; normed = RMSNorm(x).
6. The K largest of softmax(gate normed), the lower index first on a tie, are the row's experts.
7. The next residual is x, and what the experts add to it.

It shares no code with the kernels, and no value is rounded in between but those of the cache.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_scaled_fp8 import dequantise, is_fp8


def reference_decode_layer(
    residual: Any,
    weights: Any,
    keys: jax.Array,
    values: jax.Array,
    positions: Any,
    *,
    K: int,
    eps: float,
    norm_topk_prob: bool = True,
) -> Any:
    """Arguments as decode_layer's, of any float dtype and size; FP8 is dequantised.

    Returns:
      A dict: x [B, H] float32 after attention, y [B, H] float32 what the experts add, ids, weights
      [B, K], logits [B, E], keys and values.
    """
    w = jax.tree.map(dequantise, weights, is_leaf=is_fp8)
    B, kv, C, D = keys.shape
    x = residual.x[:B].astype(jnp.float32)
    if residual.parts is not None:
        parts = jnp.where(positions.valid[:, None] > 0, residual.parts[:, :B], 0)
        x = x + jnp.sum(parts, axis=0)

    # Attention.
    normed = _rms_norm(x, w.input_layernorm, eps)
    q, k, v = (_product(normed, p).reshape(B, -1, D) for p in (w.q_proj, w.k_proj, w.v_proj))
    q = _rope(_rms_norm(q, w.q_norm, eps), positions)
    k = _rope(_rms_norm(k, w.k_norm, eps), positions)
    slots = jnp.arange(C)
    is_new = slots == (positions.lengths % C)[:, None]  # [B, C]
    is_new &= positions.valid[:, None] > 0
    keys, values = (
        jnp.where(is_new[:, None, :, None], new[:, :, None].astype(old.dtype), old)
        for new, old in ((k, keys), (v, values))
    )
    n = jnp.minimum(positions.lengths + positions.valid, C)
    visible = (slots < n[:, None])[:, None, None]  # [B, 1, 1, C]
    grouped = q.reshape(B, kv, -1, D)
    scores = jnp.einsum("bgqd,bgnd->bgqn", grouped, keys.astype(jnp.float32), precision="highest")
    scores = jnp.where(visible, scores * D**-0.5, -jnp.inf)
    attention = jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0)
    shown = jnp.where(visible[:, :, 0, :, None], values.astype(jnp.float32), 0)
    attended = jnp.einsum("bgqn,bgnd->bgqd", attention, shown, precision="highest")
    x = x + _product(attended.reshape(B, -1), w.o_proj)

    # The experts.
    normed = _rms_norm(x, w.post_attention_layernorm, eps)
    logits = _product(normed, w.gate)
    chosen, ids = lax.top_k(jax.nn.softmax(logits, axis=-1), K)
    if norm_topk_prob:
        chosen = chosen / jnp.sum(chosen, axis=-1, keepdims=True)
    y = jnp.zeros_like(x)
    for k in range(K):
        gate_up, down = w.gate_up[ids[:, k]], w.down[ids[:, k]]
        gate, up = jnp.einsum("bh,bzih->zbi", normed, gate_up, precision="highest")
        y += chosen[:, k, None] * jnp.einsum(
            "bi,bhi->bh", jax.nn.silu(gate) * up, down, precision="highest"
        )
    is_valid = positions.valid[:, None] > 0
    return {
        "x": x,
        "y": jnp.where(is_valid, y, 0),
        "ids": jnp.where(is_valid, ids, -1),
        "weights": chosen,
        "logits": logits,
        "keys": keys,
        "values": values,
    }


def _product(x, weight):
    return jnp.einsum("bi,oi->bo", x, weight, precision="highest")


def _rms_norm(x, weight, eps):
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _rope(x, positions):
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * positions.cos[:, None] + turned * positions.sin[:, None]
