"""The KV cache: the keys and values of each layer, of fixed size, with one length a row.

A row is compact: only its valid tokens are stored, in order, so padding on either side of a prompt
leaves no holes and rows of different lengths decode side by side. Token p of a row lies in slot
p mod C. Without a sliding window C is the most tokens a row may hold; with one, C is the window and
new tokens overwrite those that no query will see again.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import Qwen3MoeConfig
from moe_jax.platform_ops import XLA, PlatformOps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """A pytree to donate to each step.

    Attributes:
      keys: for each layer [B, kv, C, D], after RoPE.
      values: likewise.
      lengths: [B] int32, valid tokens seen in each row, more than C of them with a window.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array


class LayerCache(NamedTuple):
    """One layer's keys, after RoPE, and values: [B, kv, C, D] each."""

    keys: jax.Array
    values: jax.Array


def init_cache(config: Qwen3MoeConfig, B: int, capacity: int, dtype=jnp.bfloat16) -> KVCache:
    """An empty cache for B rows of at most `capacity` tokens, in the model's dtype.

    Raises:
      ValueError: B or capacity is not positive.
    """
    for name, value in (("B", B), ("capacity", capacity)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    C = capacity if config.window is None else min(capacity, config.window)
    shape = (B, config.num_key_value_heads, C, config.head_dim)

    def layers() -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers))

    return KVCache(keys=layers(), values=layers(), lengths=jnp.zeros(B, jnp.int32))


def slots_of(valid: jax.Array, lengths: jax.Array, ops: PlatformOps = XLA) -> jax.Array:
    """[B, S] int32: the place of each new token in its row; padding gets the place before it.

    Args:
      valid: [B, S] bool.
      lengths: [B] int32, tokens already in each row.
      ops: the platform's form of the functions that need one.
    """
    return lengths[:, None] + ops.running_count(valid) - 1


def stored_positions(lengths: jax.Array, C: int) -> jax.Array:
    """[B, C] int32: which token of its row lies in each slot; negative where there is none yet."""
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(C, dtype=jnp.int32)) % C


def write(
    stored: jax.Array,
    new: jax.Array,
    slots: jax.Array,
    valid: jax.Array,
    ops: PlatformOps = XLA,
) -> jax.Array:
    """Puts new [B, kv, S, D] into stored [B, kv, C, D]; padding is not written.

    Of more than C new tokens the last C stay, as if each had been written by itself.
    """
    C = stored.shape[2]
    kept = valid & (slots > slots[:, -1:] - C)
    index = jnp.where(kept, slots % C, C)  # C is outside, and dropped
    return ops.put(stored, new.astype(stored.dtype), index)


def extend(
    cache: LayerCache,
    new: LayerCache,
    slots: jax.Array,
    valid: jax.Array,
    lengths: jax.Array,
    window: int | None,
    ops: PlatformOps = XLA,
) -> tuple[LayerCache, jax.Array, LayerCache]:
    """Writes new tokens into one layer's cache, and says what they attend to.

    Args:
      cache: the layer's before these tokens.
      new: their keys and values, [B, kv, S, D] each.
      slots: [B, S] int32, the place of each new token in its row.
      valid: [B, S] bool.
      lengths: [B] int32, tokens in each row before these.
      window: the sliding window, or None.
      ops: the platform's form of the write.

    Returns:
      Keys and values [B, kv, N, D] to attend to, their slots [B, N] (negative where there is no
      key), and the cache with the new tokens.
    """
    updated = LayerCache(
        keys=write(cache.keys, new.keys, slots, valid, ops),
        values=write(cache.values, new.values, slots, valid, ops),
    )
    C = cache.keys.shape[2]
    if window is None or slots.shape[1] == 1:
        return updated, stored_positions(lengths + jnp.sum(valid, axis=1), C), updated
    # The new tokens may overwrite what the first of them still sees: attend to both.
    both = jax.tree.map(
        lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=2), cache, new
    )
    new_slots = jnp.where(valid, slots, -1)
    key_slots = jnp.concatenate([stored_positions(lengths, C), new_slots], axis=1)
    return both, key_slots, updated


def overflowed(cache: KVCache, config: Qwen3MoeConfig) -> jax.Array:
    """[B] bool: rows with tokens that were overwritten although a query may still see them."""
    C = cache.keys[0].shape[2]
    keeps_the_window = config.window is not None and config.window <= C
    if keeps_the_window:
        return jnp.zeros(cache.lengths.shape, bool)
    return cache.lengths > C
