"""Losses, as functions of logits that are returned and never stored on the side."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moe_jax.integers import at_least_int32
from moe_jax.packing import next_tokens

IGNORED_LABEL = -100


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    valid: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Mean of -log p(next token): each token's logits are compared with the next token's label.

    In float32, over labels that are not -100; NaN if there are none, as in torch. A label outside
    [0, V) that is not -100 gives NaN too, because a compiled function cannot raise an error.

    Args:
      logits: [B, S, V].
      labels: [B, S] integers.
      valid: [B, S] bool, False for padding, which predicts nothing and is not predicted: the next
        token is the next valid one. None: all valid.
      segments: [B, S] integers, equal within a sequence; the first token of a sequence is not
        predicted. None for one sequence a row.

    Returns:
      A float32 scalar.
    """
    targets = next_token_targets(labels, valid=valid, segments=segments)[:, :-1]
    summed = summed_cross_entropy(logits[:, :-1], targets)
    return summed / jnp.sum(targets != IGNORED_LABEL)


def next_token_targets(
    labels: jax.Array, *, valid: jax.Array | None = None, segments: jax.Array | None = None
) -> jax.Array:
    """[B, S] int: the label of the token after each token, -100 where nothing is to be predicted.

    The last column is -100. Arguments as in `cross_entropy`.
    """
    labels = at_least_int32(labels)
    if valid is None and segments is None:
        return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
    valid = jnp.ones(labels.shape, bool) if valid is None else valid > 0
    column = next_tokens(valid, segments)
    targets = jnp.take_along_axis(labels, column, axis=1, mode="clip")
    return jnp.where(column < labels.shape[1], targets, IGNORED_LABEL)


def summed_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The sum of -log p(target) over the targets that are not -100: 0 if there are none.

    In float32. A target outside [0, V) that is not -100 gives NaN.

    Args:
      logits: [B, S, V], each compared with the target in its own place.
      targets: [B, S] integers.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    inside = (targets >= 0) & (targets < logits.shape[-1])
    picked = jnp.take_along_axis(log_p, jnp.where(inside, targets, 0)[..., None], axis=-1)[..., 0]
    losses = -jnp.where(inside, picked, jnp.nan)
    return jnp.sum(jnp.where(targets != IGNORED_LABEL, losses, 0))


def load_balancing_loss(
    logits: Sequence[jax.Array], K: int, valid: jax.Array | None = None
) -> jax.Array:
    """E * sum over e of f_e * P_e, over the tokens of all layers pooled, as Hugging Face has it.

    f_e is the share of valid tokens that chose e (all f_e add up to K) and P_e the mean of their
    probabilities of e. A uniform router gives K, one that sends all to the same expert gives E.
    Source: Fedus et al. 2021, equations 4 to 6; transformers' load_balancing_loss_func.

    Args:
      logits: for each MoE layer, [T, E].
      K: experts a token.
      valid: [T] bool or 0/1; padding counts nowhere. None: all valid.

    Returns:
      A float32 scalar; NaN if no token is valid.

    Raises:
      ValueError: there is no layer.
    """
    sums = [_shares(layer, K, valid) for layer in _at_least_one(logits)]
    chosen, probability, tokens = (sum(parts) for parts in zip(*sums, strict=True))
    return balance_of_sums(chosen, probability, tokens)


def load_balancing_loss_per_layer(
    logits: Sequence[jax.Array], K: int, valid: jax.Array | None = None
) -> jax.Array:
    """[layers] float32: the loss of each layer by itself.

    Pooling hides a bad layer behind the others: two layers that each use one half of the experts
    balance when pooled. The mean of this is the per-layer variant of the loss.
    """
    return jnp.stack(
        [balance_of_sums(*_shares(layer, K, valid)) for layer in _at_least_one(logits)]
    )


def balance_of_sums(chosen: jax.Array, probability: jax.Array, tokens: jax.Array) -> jax.Array:
    """E * sum over e of f_e * P_e from sums over `tokens` tokens, those of one layer or of several.

    It is linear in `probability`, so for given `chosen` the parts of a batch may be added up.

    Args:
      chosen: [..., E], how many tokens chose each expert; it has no gradient.
      probability: [..., E] float32, the sums of their probabilities.
      tokens: [...], valid tokens.

    Returns:
      [...] float32.
    """
    return chosen.shape[-1] * jnp.sum(
        chosen / tokens[..., None] * probability / tokens[..., None], axis=-1
    )


def router_z_loss(logits: Sequence[jax.Array], valid: jax.Array | None = None) -> jax.Array:
    """Mean over layers and valid tokens of logsumexp(logits)^2, which keeps logits small.

    Source: Zoph et al. 2022 (ST-MoE), equation 5. Arguments as in `load_balancing_loss`.
    """
    stacked = jnp.stack(_at_least_one(logits)).astype(jnp.float32)  # [layers, T, E]
    squares = jnp.square(jax.nn.logsumexp(stacked, axis=-1))  # [layers, T]
    mask = _mask(valid, squares.shape[1])
    return jnp.sum(jnp.where(mask > 0, squares, 0)) / (len(logits) * jnp.sum(mask))


def _at_least_one(logits: Sequence[jax.Array]) -> Sequence[jax.Array]:
    if not len(logits):
        raise ValueError(
            "logits has no layer; expected the router logits of at least one MoE layer"
        )
    return logits


def _mask(valid: jax.Array | None, T: int) -> jax.Array:
    return jnp.ones(T, jnp.float32) if valid is None else (valid > 0).astype(jnp.float32)


def _shares(logits, K, valid):
    """Sums over valid tokens: [E] choices, [E] probabilities, and how many tokens there are."""
    T, E = logits.shape
    mask = _mask(valid, T)
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)  # [T, E]
    _, ids = jax.lax.top_k(probabilities, K)
    chose = jnp.any(ids[:, :, None] == jnp.arange(E), axis=1)  # [T, E]
    counted = mask[:, None] > 0
    return (
        jnp.sum(jnp.where(counted, chose.astype(jnp.float32), 0), axis=0),
        jnp.sum(jnp.where(counted, probabilities, 0), axis=0),
        jnp.sum(mask),
    )
