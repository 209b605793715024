"""Several sequences in one row: which tokens belong together, and where each stands in its own.

Example, two sequences of 3 and 2 tokens and one column of padding:

    position_ids   0  1  2  0  1  .      restart where a sequence begins
    segments       0  0  0  1  1  .      equal within a sequence
    next token     1  2  6  4  6  6      the column of a token's successor; S = 6 where it has none
"""

import jax
import jax.numpy as jnp

from moe_jax.integers import at_least_int32
from moe_jax.platform_ops import XLA, PlatformOps


def segments_of(position_ids: jax.Array, ops: PlatformOps = XLA) -> jax.Array:
    """[B, S] int32 from position_ids [B, S]: the number of each token's sequence in its row.

    A position that is not the one before plus 1 begins a sequence, as in transformers'
    find_packed_sequence_indices.
    """
    position_ids = at_least_int32(position_ids)
    steps = position_ids[:, 1:] - position_ids[:, :-1]
    begins = jnp.pad(steps != 1, ((0, 0), (1, 0)))
    return ops.running_count(begins)


def places_in_segments(segments: jax.Array, valid: jax.Array) -> jax.Array:
    """[B, S] int32: how many valid tokens of its own sequence come before each token.

    Args:
      segments: [B, S] integers, equal within a sequence.
      valid: [B, S] bool.
    """
    column = jnp.arange(valid.shape[1])
    before = column[None, :] < column[:, None]  # [S, S]: the second comes before the first
    together = segments[:, :, None] == segments[:, None, :]
    return jnp.sum(before & together & valid[:, None, :], axis=-1, dtype=jnp.int32)


def next_tokens(valid: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """[B, S] int32: the column of the next valid token of the same sequence; S where there is none.

    Padding has no next token.

    Args:
      valid: [B, S] bool.
      segments: [B, S] integers, equal within a sequence; None for one a row.
    """
    S = valid.shape[1]
    column = jnp.arange(S, dtype=jnp.int32)
    follows = (column[None, :] > column[:, None]) & valid[:, None, :] & valid[:, :, None]
    if segments is not None:
        follows &= segments[:, :, None] == segments[:, None, :]
    return jnp.min(jnp.where(follows, column, S), axis=-1)
