"""The router as functions on arrays: logits, softmax over all experts, top-k, renormalisation.

1. logits[t, e] = x[t] . gate[e], in float32.
2. p[t] = softmax(logits[t]) over all experts, in float32.
3. ids[t], w[t] = the K largest p[t], the lower index first where two are equal.
4. w[t] = w[t] / sum(w[t]) if norm_topk_prob.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.integers import int32_ids
from moe_jax.platform_ops import XLA, PlatformOps
from moe_jax.products import einsum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """Where each token goes.

    Attributes:
      ids: [T, K] int32, the experts of each token; -1 for a token that is padding.
      weights: [T, K] float32, their weights; 0 for padding.
      logits: [T, E] float32, of padding too.
      probabilities: [T, E] float32, the softmax of the logits.
    """

    ids: jax.Array
    weights: jax.Array
    logits: jax.Array
    probabilities: jax.Array


def router_logits(x: jax.Array, gate: jax.Array, *, dtype: str = "float32") -> jax.Array:
    """Scores of every expert, [T, E] float32, of tokens x [T, H] with gate [E, H].

    Args:
      x: in the model's dtype.
      gate: likewise.
      dtype: "float32" keeps the float32 sums. "model" rounds them to x's dtype, as Hugging Face
        does; that sends some tokens of a bfloat16 model to other experts.
    """
    logits = einsum("th,eh->te", x, gate)
    if dtype == "model":
        logits = logits.astype(x.dtype).astype(jnp.float32)
    return logits


def route(
    logits: jax.Array,
    K: int,
    *,
    norm_topk_prob: bool,
    valid: jax.Array | None = None,
    weights_dtype=jnp.float32,
    ops: PlatformOps = XLA,
) -> Routing:
    """Chooses K experts for each token.

    Args:
      logits: [T, E] float32.
      K: experts a token.
      norm_topk_prob: whether the K weights are divided by their sum.
      valid: [T] bool; False is padding, which is routed nowhere. None: all valid.
      weights_dtype: what the weights are rounded to (Hugging Face: the logits' dtype).
      ops: the platform's form of top_k.

    Raises:
      ValueError: K is not in [1, E].
    """
    E = logits.shape[-1]
    if not 1 <= K <= E:
        raise ValueError(f"K is {K}; expected 1 to E = {E} experts a token")
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)  # [T, E]
    weights, ids = ops.top_k(probabilities, K)
    return _finish(logits, probabilities, ids, weights, norm_topk_prob, valid, weights_dtype)


def replay_route(
    logits: jax.Array,
    ids: jax.Array,
    weights: jax.Array | None,
    *,
    norm_topk_prob: bool,
    valid: jax.Array | None = None,
    weights_dtype=jnp.float32,
) -> Routing:
    """`route` with the experts given, in place of the top-k.

    Args:
      logits: [T, E] float32.
      ids: [T, K] of any integer dtype; an id outside [0, E) is padding, entry by entry.
      weights: [T, K] float32, used as they are; None takes the probabilities of `ids`.
      norm_topk_prob: applies to weights taken from the probabilities.
      valid: as in `route`.
      weights_dtype: as in `route`.
    """
    E = logits.shape[-1]
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    ids = int32_ids(ids, E)
    inside = (ids >= 0) & (ids < E)
    ids = jnp.where(inside, ids, -1)
    if weights is None:
        # A comparison and a sum with one term that is not 0, because a gather would have two axes.
        chosen = ids[..., None] == jnp.arange(E, dtype=ids.dtype)  # [T, K, E]
        weights = jnp.sum(jnp.where(chosen, probabilities[:, None], 0), axis=-1)
    else:
        norm_topk_prob = False
    return _finish(logits, probabilities, ids, weights, norm_topk_prob, valid, weights_dtype)


def _finish(logits, probabilities, ids, weights, norm_topk_prob, valid, weights_dtype) -> Routing:
    if norm_topk_prob:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(weights_dtype).astype(jnp.float32)
    if valid is not None:
        ids = jnp.where(valid[:, None], ids, -1)
    # Select, because a padded row that is NaN must have weight 0 and not NaN.
    weights = jnp.where(ids >= 0, weights, 0)
    return Routing(
        ids=ids.astype(jnp.int32), weights=weights, logits=logits, probabilities=probabilities
    )
