"""What the op means, in plain jnp: the oracle of the kernel, with its signature.

1. x[t] = norm_weight * bf16(x[t] / sqrt(mean(x[t]^2) + eps)), if there is a norm_weight.
2. logits[t, e] = x[t] . gate[e], in float32.
3. p[t] = softmax(logits[t]) over all experts; the K largest, the lower index first on a tie.
4. weights[t] = those p, divided by their sum if norm_topk_prob.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Route(NamedTuple):
    """Where each token goes.

    Attributes:
      ids: [T, K] int32, the experts of each token, the likeliest first.
      weights: [T, K] float32, their weights.
      logits: [T, E] float32.
      normed: [T, H] in x's dtype, x after the RMSNorm, if there was one.
    """

    ids: jax.Array
    weights: jax.Array
    logits: jax.Array
    normed: jax.Array | None


def reference_route_tokens(
    x: jax.Array,
    gate: jax.Array,
    *,
    K: int,
    norm_topk_prob: bool = True,
    norm_weight: jax.Array | None = None,
    norm_eps: float = 1e-6,
    interpret=False,
) -> Route:
    """route_tokens in XLA's own operations, with gradients; any float dtype, T, E and H.

    The K are chosen by logit. Softmax keeps their order, but rounds some that differ to the same
    probability, where a choice by probability would fall back on the index.

    Args and returns: as in route_tokens; `interpret` has no meaning here.
    """
    del interpret
    normed = None
    if norm_weight is not None:
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        x = normed = norm_weight * (wide * lax.rsqrt(variance + norm_eps)).astype(x.dtype)
    logits = jnp.einsum(
        "th,eh->te",
        x.astype(jnp.float32),
        gate.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )
    _, ids = lax.top_k(logits, K)
    weights = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), ids, axis=-1)
    if norm_topk_prob:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Route(ids=ids, weights=weights, logits=logits, normed=normed)
