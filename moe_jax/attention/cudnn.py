"""Attention by cuDNN's flash attention, which keeps no scores; it has gradients."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

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
    own_keys: bool = False,
    unpadded: bool = False,
    implementation: str = "cudnn",
) -> jax.Array:
    """Arguments and result as in moe_jax.attention.attention; zeros where a query is padding.

    Where queries are the keys' own tokens, cuDNN's causal mask leaves out what no query sees: of
    rows as they are if they are unpadded, else, without a window, with their padding behind their
    tokens. Elsewhere the mask is an array, [B, 1, S, N] in q's dtype.

    Args:
      implementation: of jax.nn.dot_product_attention; "xla" computes the same on any device.
    """
    q, k, v = (array.swapaxes(1, 2) for array in (q, k, v))  # [B, S or N, heads or kv, D]
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    causal = functools.partial(attend, is_causal=True)
    own_keys = own_keys and segments is None
    if own_keys and unpadded:
        seen_before = None if window is None else (window - 1, 0)
        out = causal(q, k, v, local_window_size=seen_before)
    elif own_keys and window is None:
        out = _without_padding(causal, q, k, v, query_slots, key_slots >= 0)
    else:
        visible = visible_keys(query_slots, key_slots, window, segments)
        out = attend(q, k, v, mask=visible[:, None])
    return out.swapaxes(1, 2)


def _without_padding(causal: Callable[..., jax.Array], q, k, v, slots, valid) -> jax.Array:
    """Attends with each row's tokens moved to its start, in their order, and moves them back.

    What is computed of padding may be anything, in a gradient too, so it is selected away.

    Args:
      causal: the attention, which takes lengths too.
      q, k, v: [B, S, heads or kv, D].
      slots: [B, S], each valid token's place in its row.
      valid: [B, S] bool, False for padding.
    """
    order = jnp.argsort(~valid, axis=1)  # stable: tokens in order, then padding
    lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)
    holds_token = jnp.arange(valid.shape[1]) < lengths[:, None]

    def move(array, places, kept):
        moved = jnp.take_along_axis(array, places[:, :, None, None], axis=1)
        return jnp.where(kept[:, :, None, None], moved, 0)

    q, k, v = (move(array, order, holds_token) for array in (q, k, v))
    # A row of nothing but padding has one query, of zeros, because a softmax needs a key.
    lengths = jnp.maximum(lengths, 1)
    out = causal(q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    return move(out, jnp.maximum(slots, 0), valid)
