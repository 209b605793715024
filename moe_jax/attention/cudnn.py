"""Attention by cuDNN's flash attention, which keeps no scores; it has gradients."""

import jax

from moe_jax.attention.xla import visible_keys


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    query_slots: jax.Array,
    key_slots: jax.Array,
    segments: jax.Array | None = None,
    window: int | None = None,
    unpadded: bool = False,
    implementation: str = "cudnn",
) -> jax.Array:
    """Arguments and result as in moe_jax.attention.attention.

    Where rows are unpadded, cuDNN's own causal mask leaves out what no query sees. Elsewhere slots
    are values that only the device knows, so the mask is an array: [B, 1, S, N] in q's dtype.

    Args:
      implementation: of jax.nn.dot_product_attention; "xla" computes the same on any device.
    """
    if unpadded:
        masks = {
            "is_causal": True,
            "local_window_size": None if window is None else (window - 1, 0),
        }
    else:
        masks = {"mask": visible_keys(query_slots, key_slots, window, segments)[:, None]}
    by_token = (array.swapaxes(1, 2) for array in (q, k, v))  # [B, S or N, heads or kv, D]
    out = jax.nn.dot_product_attention(*by_token, implementation=implementation, **masks)
    return out.swapaxes(1, 2).astype(q.dtype)
