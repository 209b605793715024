"""The KV cache: what each layer has seen, of fixed size, one length a row.

A row is compact: only its valid tokens are stored, in order, so padding on either side of a prompt
leaves no holes and rows of different lengths decode side by side. Token p of a row lies in slot
p mod C. Without a sliding window C is the most tokens a row may hold; with one, C is the window and
new tokens overwrite those that no query will see again.
"""

import dataclasses

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

    Of more than C new tokens the last C stay, as if they had come one after the other.
    """
    C = stored.shape[2]
    kept = valid & (slots > slots[:, -1:] - C)
    index = jnp.where(kept, slots % C, C)  # C is outside, and dropped
    return ops.put(stored, new.astype(stored.dtype), index)


def overflowed(cache: KVCache, config: Qwen3MoeConfig) -> jax.Array:
    """[B] bool: rows with tokens that were overwritten although a query may still see them."""
    C = cache.keys[0].shape[2]
    keeps_the_window = config.window is not None and config.window <= C
    if keeps_the_window:
        return jnp.zeros(cache.lengths.shape, bool)
    return cache.lengths > C
