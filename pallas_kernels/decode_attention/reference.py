"""What decode attention means, in plain jnp and float32: the oracle of the kernel."""

import jax
import jax.numpy as jnp
from jax import lax


def reference_attend(
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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`attend` with its arguments; attended is float32, the caches are of the given dtype.

    1. Queries and keys are RMS-normed over D, and turned by RoPE; all three are rounded once, to
       the cache's dtype.
    2. Where valid, the new key and value take the place of token lengths - C, if there is one.
    3. attended = softmax(q k / sqrt(D)) v over the min(lengths + valid, C) keys that are stored.
    """
    B, kv, C, D = keys.shape
    heads = qkv.shape[2] - 2 * kv
    summed = jnp.zeros(qkv.shape[1:], jnp.float32)
    for partial in qkv:
        summed += partial
    queries, new_keys, new_values = jnp.split(summed[:B], [heads, heads + kv], axis=1)

    def prepared(x, weight):
        x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
        x = x * weight.astype(jnp.float32)
        turned = jnp.concatenate([-x[..., D // 2 :], x[..., : D // 2]], axis=-1)
        return (x * cos[:, None] + turned * sin[:, None]).astype(keys.dtype)  # [B, heads, D]

    slots = jnp.arange(C)
    is_new = (slots == (lengths % C)[:, None]) & (valid != 0)[:, None]  # [B, C]
    is_new = is_new[:, None, :, None]
    keys = jnp.where(is_new, prepared(new_keys, k_norm)[:, :, None], keys)
    values = jnp.where(is_new, new_values.astype(values.dtype)[:, :, None], values)

    stored = jnp.minimum(lengths + (valid != 0), C)
    visible = (slots < stored[:, None])[:, None, None]  # [B, 1, 1, C]
    grouped = prepared(queries, q_norm).reshape(B, kv, heads // kv, D).astype(jnp.float32)
    precision = lax.Precision.HIGHEST
    scores = jnp.einsum(
        "bkgd,bkcd->bkgc", grouped, keys.astype(jnp.float32), precision=precision
    ) / jnp.sqrt(jnp.float32(D))
    largest = jnp.max(scores, axis=-1, keepdims=True, where=visible, initial=-1e30)
    weights = jnp.where(visible, jnp.exp(scores - largest), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)  # [B, kv, G, C]
    seen = jnp.where(visible[:, :, 0, :, None], values.astype(jnp.float32), 0)
    attended = jnp.einsum("bkgc,bkcd->bkgd", weights, seen, precision=precision)
    return attended.reshape(B, heads * D), keys, values
