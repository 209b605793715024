"""Logits processors: functions on logits [B, V], with the names and meanings of transformers'.

They are plain functions of arrays, to be called inside the compiled step; `process` of sampling.py
puts them in order. Some look at the tokens that a row holds so far, its TokenHistory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.cache import slots_of
from moe_jax.platform_ops import XLA, PlatformOps

# No token: what `choose` returns for a row without a choice, and what fills tables of tokens up. It
# bans none, stops at none, and in the prefix of a bad word it asks for none.
NO_TOKEN = -1
_BEFORE_THE_ROW = -2


class TokenHistory(NamedTuple):
    """The tokens that each row holds, prompt and new ones; None for what no processor looks at.

    Attributes:
      seen: [B, V] bool, whether the row has the token.
      ids: [B, N] int32, the row's tokens in order, in its first `lengths` places.
      lengths: [B] int32; None without ids.
    """

    seen: jax.Array | None = None
    ids: jax.Array | None = None
    lengths: jax.Array | None = None

    def append(self, ids: jax.Array, valid: jax.Array, ops: PlatformOps = XLA) -> "TokenHistory":
        """The history with new tokens.

        Args:
          ids: [B, S] int32.
          valid: [B, S] bool, False for padding, which is left out.
          ops: the platform's form of the functions that need one.
        """
        rows = jnp.arange(ids.shape[0])[:, None]
        seen, stored, lengths = self
        if seen is not None:
            seen = seen.at[rows, ids].max(valid)
        if stored is not None:
            N = stored.shape[1]
            places = jnp.where(valid, slots_of(valid, lengths, ops), N)  # N is outside, and dropped
            stored = stored.at[rows, places].set(ids, mode="drop")
            lengths = lengths + jnp.sum(valid, axis=1, dtype=jnp.int32)
        return TokenHistory(seen, stored, lengths)


def repetition_penalty(logits: jax.Array, seen: jax.Array, penalty) -> jax.Array:
    """Divides positive logits of seen tokens by the penalty, multiplies negative ones with it.

    Args:
      logits: [B, V] float32.
      seen: [B, V] bool, the tokens of each row's prompt and of what it generated.
      penalty: above 0.
    """
    penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalised, logits)


def no_repeat_ngrams(logits: jax.Array, ids: jax.Array, lengths: jax.Array, size: int) -> jax.Array:
    """Bans each token that would complete an n-gram which the row has already.

    With size = 3 a row 5 6 7 5 6 must not go on with 7: its last two tokens are 5 6, and 5 6 7 is
    there. With size = 1 each token comes once.

    Args:
      logits: [B, V].
      ids, lengths: of the TokenHistory.
      size: of the n-grams, from 1 up; not an array.
    """
    N, V = ids.shape[1], logits.shape[1]
    if size > N:
        return logits
    start, offset = jnp.arange(N), jnp.arange(size - 1)
    windows = ids[:, jnp.minimum(start[:, None] + offset, N - 1)]  # [B, N, size - 1]
    prefix = _last_tokens(ids, lengths, size - 1)  # [B, size - 1]
    whole = start + size - 1 < lengths[:, None]  # [B, N]: an n-gram starts here
    repeats = whole & jnp.all(windows == prefix[:, None], axis=-1)
    completes = jnp.roll(ids, 1 - size, axis=1)  # [B, N], each n-gram's last token
    return _ban(logits, jnp.where(repeats, completes, V))


def bad_words(
    logits: jax.Array, ids: jax.Array, lengths: jax.Array, prefixes: jax.Array, last: jax.Array
) -> jax.Array:
    """Bans the last token of each word whose other tokens the row ends with.

    Args:
      logits: [B, V].
      ids, lengths: of the TokenHistory.
      prefixes: [W, P] int32, each word's tokens but the last; NO_TOKEN fills a row from the left.
      last: [W] int32, each word's last token; NO_TOKEN bans none.
    """
    V, P = logits.shape[1], prefixes.shape[1]
    ends = _last_tokens(ids, lengths, P)[:, None]  # [B, 1, P]
    matches = jnp.all((prefixes == NO_TOKEN) | (prefixes == ends), axis=-1)  # [B, W]
    return _ban(logits, jnp.where(matches & (last != NO_TOKEN), last, V))


def suppress_tokens(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Bans tokens [M] int32 in every row of logits [B, V]; NO_TOKEN among them bans none."""
    V = logits.shape[1]
    return _ban(logits, jnp.where(tokens == NO_TOKEN, V, tokens)[None])


def temperature(logits: jax.Array, value) -> jax.Array:
    """Divides logits [B, V] by a temperature above 0."""
    return logits / value


def top_k(logits: jax.Array, k) -> jax.Array:
    """Keeps the k highest of each row and all that equal the last of them; the rest is -inf."""
    return drop_below(logits, kth_highest(jnp.sort(logits, axis=-1), k))


def top_p(logits: jax.Array, p) -> jax.Array:
    """Keeps the fewest tokens of each row that together reach probability p, at least one.

    Of equal logits at the border the lower ids stay. How many stay is as in transformers; which
    ones is left to an unstable sort there.
    """
    return drop_tail(logits, jnp.sort(logits, axis=-1), 1 - p)


def min_p(logits: jax.Array, p) -> jax.Array:
    """Keeps tokens whose probability is at least p times that of their row's likeliest."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    floor = p * jnp.max(probabilities, axis=-1, keepdims=True)
    return jnp.where(probabilities < floor, -jnp.inf, logits)


def drop_below(logits: jax.Array, border: jax.Array) -> jax.Array:
    """What is below border [B, 1] in logits [B, V] becomes -inf."""
    return jnp.where(logits < border, -jnp.inf, logits)


def kth_highest(ordered: jax.Array, k) -> jax.Array:
    """[B, 1], from rows [B, V] in ascending order; the lowest where k exceeds V."""
    V = ordered.shape[-1]
    place = jnp.maximum(V - jnp.asarray(k), 0)
    return jax.lax.dynamic_slice_in_dim(ordered, place, 1, axis=-1)


def drop_tail(logits: jax.Array, ordered: jax.Array, removed_mass) -> jax.Array:
    """Drops the least likely tokens that together hold no more than `removed_mass`.

    Args:
      logits: [B, V].
      ordered: [B, V], the same in ascending order.
      removed_mass: a probability.
    """
    V = ordered.shape[-1]
    mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    dropped = jnp.sum(mass <= removed_mass, axis=-1, keepdims=True)
    dropped = jnp.minimum(dropped, V - 1)  # [B, 1]; the likeliest always stays
    border = jnp.take_along_axis(ordered, dropped, axis=-1)
    # Without moving `dropped` back through the sort: all below the border go, and of those equal to
    # it stay as many as the sorted row still has from there on.
    equal = logits == border
    stay = V - dropped - jnp.sum(logits > border, axis=-1, keepdims=True)
    goes = (logits < border) | (equal & (jnp.cumsum(equal, axis=-1) > stay))
    return jnp.where(goes, -jnp.inf, logits)


def _last_tokens(ids: jax.Array, lengths: jax.Array, count: int) -> jax.Array:
    """[B, count]: the last tokens of each row; _BEFORE_THE_ROW where it has fewer."""
    places = lengths[:, None] - count + jnp.arange(count)
    tokens = jnp.take_along_axis(ids, jnp.maximum(places, 0), axis=1)
    return jnp.where(places < 0, _BEFORE_THE_ROW, tokens)


def _ban(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Logits [B, V] with -inf for tokens [1 or B, M]; a token of V is none."""
    banned = jnp.zeros((tokens.shape[0], logits.shape[1]), bool)
    banned = banned.at[jnp.arange(tokens.shape[0])[:, None], tokens].set(True, mode="drop")
    return jnp.where(banned, -jnp.inf, logits)
