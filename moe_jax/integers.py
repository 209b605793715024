"""Integers of any dtype as int32, because a comparison takes place in the array's own dtype.

In int8, `ids < 128` compares with -128, and in uint8 `ids < 256` compares with 0. So what indexes a
table (tokens, experts, labels, positions) is widened first.
"""

import jax
import jax.numpy as jnp


def at_least_int32(array: jax.Array) -> jax.Array:
    """The array itself if its integers have 32 bits or more, else as int32; any shape."""
    return array if array.dtype.itemsize >= 4 else jnp.asarray(array, jnp.int32)


def int32_ids(ids: jax.Array, limit: int) -> jax.Array:
    """Returns ids as int32; one outside [0, limit) stays outside. Any shape, any integer dtype."""
    if ids.dtype == jnp.int32:
        return ids
    ids = at_least_int32(ids)
    return jnp.where((ids >= 0) & (ids < limit), ids, limit).astype(jnp.int32)
