"""The few array functions that a compiler of unknown abilities needs in another form.

XLA on CPUs and GPUs takes all that JAX has. On Ascend these have been seen to work: gather along
one axis, dot, reductions of one operand, comparisons, selects, elementwise functions. JAX lowers
some functions to a sort, a scatter, a windowed or a two-operand reduction. This table has a plain
form of each, with the same bits.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.platforms import has_all_of_xla


class PlatformOps(NamedTuple):
    """One form of each function.

    Attributes:
      top_k: (scores [..., N], K) -> the K highest, from high to low, and their indices, both
        [..., K]; the lower index first where two are equal.
      argmax: scores [..., N] -> [...] int32, the lowest index of the highest; of a NaN, if any.
      running_count: flags [B, S] -> [B, S] int32, how many up to and including each are True.
      put: (stored [B, kv, C, D], new [B, kv, S, D], index [B, S]) -> stored with new token s of
        row b in slot index[b, s]; an index of C is dropped. No slot is given twice.
    """

    top_k: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
    argmax: Callable[[jax.Array], jax.Array]
    running_count: Callable[[jax.Array], jax.Array]
    put: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _argmax(scores: jax.Array) -> jax.Array:
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def _running_count(flags: jax.Array) -> jax.Array:
    return jnp.cumsum(flags, axis=1, dtype=jnp.int32)


def _put(stored: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    rows = jnp.arange(stored.shape[0])[:, None]
    return stored.at[rows, :, index].set(new.swapaxes(1, 2), mode="drop")


XLA = PlatformOps(top_k=jax.lax.top_k, argmax=_argmax, running_count=_running_count, put=_put)


def portable_top_k(scores: jax.Array, K: int) -> tuple[jax.Array, jax.Array]:
    """K times: the maximum, then the lowest index that holds it, then that one is out.

    A row that holds a NaN gets NaN K times, with indices inside [0, N).
    """
    N = scores.shape[-1]
    index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    left = jnp.ones(scores.shape, bool)
    values, indices = [], []
    for _ in range(K):
        # Those that are out count as -inf here and are told from a true -inf by `left`.
        highest = jnp.max(jnp.where(left, scores, -jnp.inf), axis=-1, keepdims=True)
        found = jnp.where(left & (scores == highest), index, N)
        chosen = jnp.min(found, axis=-1, keepdims=True)
        left &= index != chosen
        values.append(highest)
        indices.append(jnp.minimum(chosen, N - 1))  # NaN equals nothing: chosen is N
    return jnp.concatenate(values, axis=-1), jnp.concatenate(indices, axis=-1)


def portable_argmax(scores: jax.Array) -> jax.Array:
    """The maximum, then the lowest index that holds it; of a NaN, if any."""
    N = scores.shape[-1]
    index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    found = (scores == highest) | (scores != scores)
    return jnp.min(jnp.where(found, index, N), axis=-1)


def portable_running_count(flags: jax.Array) -> jax.Array:
    """Each position compares itself with all others: [B, S, S] comparisons under one sum."""
    S = flags.shape[1]
    if S == 1:
        return flags.astype(jnp.int32)
    place = jnp.arange(S)
    up_to = place[None, :] <= place[:, None]  # [S, S]
    return jnp.sum(flags[:, None, :] & up_to[None], axis=-1, dtype=jnp.int32)


def portable_put(stored: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    """Each slot asks which new token it gets, and takes it or keeps what it has."""
    B, kv, C, D = stored.shape
    S = new.shape[2]
    gets = index[:, None, :] == jnp.arange(C, dtype=index.dtype)[:, None]  # [B, C, S]
    if S == 1:
        return jnp.where(gets[:, None], new, stored)  # [B, 1, C, 1]
    token = jnp.max(jnp.where(gets, jnp.arange(S, dtype=jnp.int32), -1), axis=-1)  # [B, C]
    # Rows of all batch rows in one axis, so that one gather along one axis fetches them.
    row = jnp.arange(B, dtype=jnp.int32)[:, None] * S + jnp.maximum(token, 0)
    rows = new.swapaxes(1, 2).reshape(B * S, kv * D)
    taken = jnp.take(rows, row.reshape(-1), axis=0, mode="clip").reshape(B, C, kv, D)
    return jnp.where((token >= 0)[:, None, :, None], taken.swapaxes(1, 2), stored)


PORTABLE = PlatformOps(
    top_k=portable_top_k,
    argmax=portable_argmax,
    running_count=portable_running_count,
    put=portable_put,
)


def platform_ops(platform: str) -> PlatformOps:
    """The forms for a platform as resolve_platform returns it: plain where XLA is known to be."""
    return XLA if has_all_of_xla(platform) else PORTABLE
