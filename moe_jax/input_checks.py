"""Named errors for what the model cannot take: the argument, its shape or value, what it takes."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.cache import KVCache
from moe_jax.config import Qwen3MoeConfig
from moe_jax.losses import IGNORED_LABEL
from moe_jax.traces import RoutingTrace


def check_inputs(
    config: Qwen3MoeConfig,
    *,
    input_ids,
    inputs_embeds,
    attention_mask,
    position_ids,
    segment_ids,
    cache,
    labels,
    logits_to_keep,
    replay,
) -> tuple[int, int]:
    """Returns (B, S), or raises a ValueError, or a TypeError for what is no array.

    Values are looked at outside compiled functions.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(
            f"input_ids and inputs_embeds: {given} given; expected exactly one of the two"
        )
    if input_ids is not None:
        _expect("input_ids", input_ids, "[B, S]", (None, None), jnp.integer)
        B, S = input_ids.shape
        check_ids("input_ids", input_ids, config.vocab_size)
    else:
        H = config.hidden_size
        _expect("inputs_embeds", inputs_embeds, f"[B, S, H = {H}]", (None, None, H), jnp.floating)
        B, S, _ = inputs_embeds.shape
    if B < 1 or S < 1:
        raise ValueError(
            f"the input has B = {B} rows of S = {S} tokens; expected at least 1 of each"
        )

    if attention_mask is not None:
        _expect("attention_mask", attention_mask, "[B, S], of the new tokens", (B, S))
    if position_ids is not None:
        found = _shape_of("position_ids", position_ids, "[1, S] or [B, S]")
        if found not in ((1, S), (B, S)):
            raise ValueError(
                f"position_ids has shape {found}; expected [1, S] or [B, S] with B, S = {B}, {S}"
            )
        _expect("position_ids", position_ids, "[B, S]", (None, S), jnp.integer)
    if segment_ids is not None:
        _expect("segment_ids", segment_ids, "[B, S]", (B, S), jnp.integer)
        if cache is not None:
            raise ValueError(
                "segment_ids and cache are both given; expected one of them, because a cache holds "
                "one sequence a row"
            )
    if labels is not None:
        _expect("labels", labels, "[B, S]", (B, S), jnp.integer)
        check_ids("labels", labels, config.vocab_size, also=IGNORED_LABEL)
        if not isinstance(logits_to_keep, (int, np.integer)) or logits_to_keep:
            raise ValueError(
                "labels and logits_to_keep are both given; the loss needs every position's logits"
            )
    _check_kept(logits_to_keep, B, S)
    for name, value, kind in (("cache", cache, KVCache), ("replay", replay, RoutingTrace)):
        if not isinstance(value, kind | None):
            raise TypeError(f"{name} is {value!r}; expected a {kind.__name__}, or None")
    if cache is not None:
        layers, rows = len(cache.keys), cache.lengths.shape[0]
        if (layers, rows) != (config.num_hidden_layers, B):
            raise ValueError(
                f"cache has {layers} layers and {rows} rows; expected "
                f"num_hidden_layers = {config.num_hidden_layers} and B = {B}"
            )
    if replay is not None:
        expected = (len(config.moe_layers), B * S, config.num_experts_per_tok)
        ids, weights = replay.expert_ids, replay.expert_weights
        _expect("replay.expert_ids", ids, "[MoE layers, B*S, K]", expected, jnp.integer)
        if weights is not None:
            _expect("replay.expert_weights", weights, "as expert_ids", expected, jnp.floating)
    return B, S


def check_ids(name: str, ids, limit: int, also: int | None = None) -> None:
    """Raises a ValueError that names the first id outside [0, limit); does nothing under a trace.

    Args:
      name: the argument.
      ids: integers.
      limit: the vocabulary's size.
      also: one value more that is accepted.
    """
    if isinstance(ids, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        return
    values = np.asarray(ids)
    wrong = (values < 0) | (values >= limit)
    if also is not None:
        wrong &= values != also
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        accepted = f"[0, {limit})" + ("" if also is None else f" or {also}")
        raise ValueError(f"{name}{list(place)} is {values[place]}; expected an id in {accepted}")


def _expect(name: str, value, letters: str, shape: tuple[int | None, ...], kind=None) -> None:
    found = _shape_of(name, value, letters)
    fits = len(found) == len(shape) and all(
        size in (None, actual) for size, actual in zip(shape, found, strict=True)
    )
    if not fits:
        sizes = "" if None in shape else f" = {shape}"
        raise ValueError(f"{name} has shape {found}; expected {letters}{sizes}")
    if kind is not None and not jnp.issubdtype(value.dtype, kind):
        raise ValueError(f"{name} has dtype {value.dtype}; expected {kind.__name__} values")


def _shape_of(name: str, value, letters: str) -> tuple[int, ...]:
    if not hasattr(value, "shape"):
        raise TypeError(f"{name} is {value!r}; expected an array {letters}")
    return tuple(value.shape)


def _check_kept(logits_to_keep, B: int, S: int) -> None:
    if isinstance(logits_to_keep, (int, np.integer)):
        if not 0 <= logits_to_keep <= S:
            raise ValueError(f"logits_to_keep is {logits_to_keep}; expected 0 to S = {S}")
        return
    shape = _shape_of("logits_to_keep", logits_to_keep, "[N] or [B, N], or an int")
    if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != B):
        raise ValueError(
            f"logits_to_keep has shape {shape}; expected an int, or indices [N] or [B, N] with "
            f"B = {B}"
        )
    if not jnp.issubdtype(logits_to_keep.dtype, jnp.integer):
        raise ValueError(f"logits_to_keep has dtype {logits_to_keep.dtype}; expected integers")
    if isinstance(logits_to_keep, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        return
    values = np.asarray(logits_to_keep)
    if np.any((values < -S) | (values >= S)):
        raise ValueError(
            f"logits_to_keep has {values.min()} to {values.max()}; expected indices in [{-S}, {S})"
        )
