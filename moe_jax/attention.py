"""Grouped-query attention with QK-norm and RoPE, with a cache and without."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.cache import stored_positions, write
from moe_jax.config import Qwen3MoeConfig
from moe_jax.layers import Linear, RMSNorm
from moe_jax.platform_ops import XLA, PlatformOps
from moe_jax.products import einsum
from moe_jax.rope import apply_rope


def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax attention; scores and softmax in float32.

    A query that sees nothing (padding) gets the mean of v: masked scores are the least finite
    number, since with -inf its softmax would be NaN.

    Args:
      q: [B, heads, S, D].
      k, v: [B, kv, N, D]; heads / kv query heads share one of them.
      visible: [B, S, N] bool, which keys each query sees.

    Returns:
      [B, heads, S, D] in q's dtype.
    """
    B, heads, S, D = q.shape
    kv = k.shape[1]
    grouped = q.reshape(B, kv, heads // kv, S, D)
    scores = einsum("bkgsd,bknd->bkgsn", grouped, k) * D**-0.5
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return einsum("bkgsn,bknd->bkgsd", weights, v).astype(q.dtype).reshape(B, heads, S, D)


def visible_keys(slots: jax.Array, positions: jax.Array, window: int | None) -> jax.Array:
    """[B, S, N] bool: causal, and the last `window` tokens only, the query's own among them.

    Args:
      slots: [B, S], each query's place in its row.
      positions: [B, N], each key's place in its row; negative where there is no key.
      window: None for all.
    """
    query, key = slots[:, :, None], positions[:, None, :]
    visible = (key >= 0) & (key <= query)
    return visible if window is None else visible & (key > query - window)


class Attention(nnx.Module):
    """q, k, v projections, RMSNorm of q and k over D, RoPE, attention, o projection."""

    def __init__(self, config: Qwen3MoeConfig, *, rngs: nnx.Rngs, dtype):
        H, D = config.hidden_size, config.head_dim
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        options = {"rngs": rngs, "dtype": dtype, "bias": config.attention_bias}
        self.q_proj = Linear(config, H, heads * D, **options)
        self.k_proj = Linear(config, H, kv * D, **options)
        self.v_proj = Linear(config, H, kv * D, **options)
        self.o_proj = Linear(config, heads * D, H, **options)
        self.q_norm = RMSNorm(config, D, dtype=dtype)
        self.k_norm = RMSNorm(config, D, dtype=dtype)
        self.D, self.window = D, config.window

    def __call__(self, x, rope, slots, valid, stored=None, ops: PlatformOps = XLA):
        """Attends from x [B, S, H] to itself and to what is stored.

        Args:
          x: [B, S, H], normed.
          rope: (cos, sin), each [1 or B, S, D].
          slots: [B, S] int32, each token's place in its row.
          valid: [B, S] bool, False for padding.
          stored: None, or (keys, values, lengths) of this layer before these tokens.
          ops: the platform's form of what writes the cache.

        Returns:
          [B, S, H], and (keys, values) of this layer after these tokens, or None.
        """
        B, S, _ = x.shape
        q = self.q_norm(self.q_proj(x).reshape(B, S, -1, self.D)).swapaxes(1, 2)
        k = self.k_norm(self.k_proj(x).reshape(B, S, -1, self.D)).swapaxes(1, 2)
        v = self.v_proj(x).reshape(B, S, -1, self.D).swapaxes(1, 2)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)

        new_positions = jnp.where(valid, slots, -1)
        updated = None
        if stored is None:
            keys, values, positions = k, v, new_positions
        else:
            old_keys, old_values, lengths = stored
            updated = tuple(
                write(old, new, slots, valid, ops) for old, new in ((old_keys, k), (old_values, v))
            )
            C = old_keys.shape[2]
            if self.window is not None and S > 1:
                # The new tokens may overwrite what the first of them still sees: attend to both.
                keys = jnp.concatenate([old_keys, k.astype(old_keys.dtype)], axis=2)
                values = jnp.concatenate([old_values, v.astype(old_values.dtype)], axis=2)
                positions = jnp.concatenate([stored_positions(lengths, C), new_positions], axis=1)
            else:
                keys, values = updated
                positions = stored_positions(lengths + jnp.sum(valid, axis=1), C)
        out = attend(q, keys, values, visible_keys(slots, positions, self.window))
        return self.o_proj(out.swapaxes(1, 2).reshape(B, S, -1)), updated
