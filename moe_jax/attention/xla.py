"""Attention in plain XLA: a product, a softmax over every key, a product."""

import jax
import jax.numpy as jnp

from moe_jax.products import einsum


def xla_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    query_slots: jax.Array,
    key_slots: jax.Array,
    segments: jax.Array | None = None,
    window: int | None = None,
    own_keys: bool = False,
    unpadded: bool = False,
) -> jax.Array:
    """Arguments and result as in moe_jax.attention.attention. Has gradients."""
    del own_keys, unpadded  # the slots say it
    return attend(q, k, v, visible_keys(query_slots, key_slots, window, segments))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax attention; scores and softmax in float32.

    A query that sees nothing (padding) gets the mean of v: masked scores are the least finite
    number, because the softmax of nothing but -inf is NaN.

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


def visible_keys(
    query_slots: jax.Array,
    key_slots: jax.Array,
    window: int | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """[B, S, N] bool: causal, in the query's segment, and the window's last tokens only.

    Args:
      query_slots: [B, S], each query's place in its row.
      key_slots: [B, N], each key's place in its row; negative where there is no key.
      window: how many keys a query sees at most, its own among them; None for all.
      segments: [B, S] with N = S, the sequence that each token belongs to; None for one a row.
    """
    query, key = query_slots[:, :, None], key_slots[:, None, :]
    visible = (key >= 0) & (key <= query)
    if segments is not None:
        visible &= segments[:, :, None] == segments[:, None, :]
    return visible if window is None else visible & (key > query - window)
