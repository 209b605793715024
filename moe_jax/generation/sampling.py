"""How a token is chosen from logits: logits processors in the order that `choose` applies them.

    1. repetition_penalty     tokens that the row has seen become less likely
    2. no_repeat_ngram_size   a token that would repeat an n-gram of the row becomes -inf
    3. bad_words_ids          the last token of a word that the row ends with becomes -inf
    4. suppress_tokens        these tokens become -inf
    5. temperature            logits / temperature; 0 takes the highest logit and skips 6 to 9
    6. top_k                  the k highest stay, the others become -inf
    7. top_p                  the fewest that hold a probability of p stay
    8. min_p                  those at least min_p times as likely as the likeliest stay
    9. a draw from the softmax of what is left

Order and meaning are those of transformers' logits processors. All of it is float32.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.generation import arguments
from moe_jax.generation import logits_processors as processors
from moe_jax.generation.logits_processors import NO_TOKEN, TokenHistory
from moe_jax.platform_ops import XLA, PlatformOps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; the default is greedy. Checked when made.

    Attributes:
      temperature: 0 is greedy: the highest logit, the lowest id of equal ones.
      top_k: 0 is off.
      top_p: 1 is off.
      min_p: 0 is off.
      repetition_penalty: 1 is off; above 1 a row's prompt and what it has generated so far become
        less likely, below 1 more likely. Applies to greedy choices too, as all below do.
      no_repeat_ngram_size: 0 is off; else no n-gram of this size comes twice in a row, its prompt
        included.
      bad_words_ids: sequences of token ids that are never completed. As in transformers, one that
        is a single stop id is let through.
      suppress_tokens: token ids that are never chosen.

    Raises:
      ValueError: names the field, its value and what is accepted.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    suppress_tokens: Sequence[int] = ()

    def __post_init__(self):
        real = arguments.real_number
        real, whole = arguments.real_number, arguments.whole_number
        checks = {
            # Bounds beyond which float32 logits would overflow.
            "temperature": lambda name, value: real(name, value, 1e-5, 1e5, " or 0 (greedy)", 0),
            "top_k": lambda name, value: whole(name, value, least=0),
            "top_p": lambda name, value: real(name, value, 0, 1, " (off)"),
            "min_p": lambda name, value: real(name, value, 0, 1, "; 0 is off"),
            "repetition_penalty": lambda name, value: real(name, value, 0.01, 100, "; 1 is off"),
            "no_repeat_ngram_size": lambda name, value: whole(name, value, least=0),
            "bad_words_ids": arguments.check_words,
            "suppress_tokens": arguments.check_token_ids,
        }
        for name, check in checks.items():  # Python's numbers and tuples, as this is hashable
            object.__setattr__(self, name, check(name, getattr(self, name)))

    def for_model(self, V: int, stop_ids: frozenset[int] = frozenset()) -> "Sampling":
        """The same for a vocabulary of V tokens: a bad word that is one stop id is let through.

        Raises:
          ValueError: a banned token is outside the vocabulary.
        """
        arguments.check_token_ids("suppress_tokens", self.suppress_tokens, V)
        for place, word in enumerate(self.bad_words_ids):
            arguments.check_token_ids(f"bad_words_ids[{place}]", word, V)
        words = [word for word in self.bad_words_ids if len(word) > 1 or word[0] not in stop_ids]
        return dataclasses.replace(self, bad_words_ids=words)

    @property
    def steps(self) -> "Steps":
        """Which processors do anything: what a compiled function is specialised to."""
        drawn = self.temperature > 0
        single = any(len(word) == 1 for word in self.bad_words_ids)
        return Steps(
            draw=drawn,
            repetition_penalty=self.repetition_penalty != 1,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            bad_words=any(len(word) > 1 for word in self.bad_words_ids),
            suppress_tokens=single or bool(self.suppress_tokens),
            top_k=drawn and self.top_k > 0,
            top_p=drawn and self.top_p < 1,
            min_p=drawn and self.min_p > 0,
        )

    def values(self) -> dict[str, np.ndarray | np.generic]:
        """The numbers as NumPy's, so that other values compile nothing anew.

        Tables of tokens grow in steps of 8 and prefixes in steps of 4, so that few shapes are
        compiled.
        """
        # A word of one token is the same as a suppressed token, and needs no history.
        words = [word for word in self.bad_words_ids if len(word) > 1]
        single = [word[0] for word in self.bad_words_ids if len(word) == 1]
        prefixes = np.full(
            (_padded(len(words), 8), _padded(max(map(len, words), default=1) - 1, 4)), NO_TOKEN
        )
        for row, word in enumerate(words):
            prefixes[row, prefixes.shape[1] + 1 - len(word) :] = word[:-1]
        return {
            "temperature": np.float32(self.temperature),
            "top_k": np.int32(min(self.top_k, 2**31 - 1)),
            "removed_mass": np.float32(1 - self.top_p),
            "min_p": np.float32(self.min_p),
            "repetition_penalty": np.float32(self.repetition_penalty),
            "bad_word_prefixes": prefixes.astype(np.int32),
            "bad_word_ends": token_table([word[-1] for word in words]),
            "suppressed": token_table([*self.suppress_tokens, *single]),
        }


class Steps(NamedTuple):
    """Which processors apply; hashable, as a static argument must be."""

    draw: bool
    repetition_penalty: bool
    no_repeat_ngram_size: int
    bad_words: bool
    suppress_tokens: bool
    top_k: bool
    top_p: bool
    min_p: bool

    @property
    def bans(self) -> bool:
        """Whether tokens may be ruled out before the draw, perhaps all of them."""
        return bool(self.no_repeat_ngram_size or self.bad_words or self.suppress_tokens)

    def empty_history(self, B: int, V: int, N: int) -> TokenHistory:
        """What the processors look at: of B rows without tokens, which may have up to N."""
        in_order = self.no_repeat_ngram_size or self.bad_words
        return TokenHistory(
            seen=jnp.zeros((B, V), bool) if self.repetition_penalty else None,
            ids=jnp.zeros((B, N), jnp.int32) if in_order else None,
            lengths=jnp.zeros(B, jnp.int32) if in_order else None,
        )


def process(logits: jax.Array, history: TokenHistory, steps: Steps, values: dict[str, Any]):
    """Steps 1 to 8 of the module on logits [B, V] of any float dtype."""
    logits = logits.astype(jnp.float32)
    row = history.ids, history.lengths
    if steps.repetition_penalty:
        penalty = values["repetition_penalty"]
        logits = processors.repetition_penalty(logits, history.seen, penalty)
    if steps.no_repeat_ngram_size:
        logits = processors.no_repeat_ngrams(logits, *row, steps.no_repeat_ngram_size)
    if steps.bad_words:
        prefixes, ends = values["bad_word_prefixes"], values["bad_word_ends"]
        logits = processors.bad_words(logits, *row, prefixes, ends)
    if steps.suppress_tokens:
        logits = processors.suppress_tokens(logits, values["suppressed"])
    if steps.draw:
        logits = processors.temperature(logits, values["temperature"])
    if steps.top_k or steps.top_p:
        # One sort serves both: what top_k drops is the lower end of the sorted row too.
        ordered = jnp.sort(logits, axis=-1)
        if steps.top_k:
            border = processors.kth_highest(ordered, values["top_k"])
            logits, ordered = (processors.drop_below(rows, border) for rows in (logits, ordered))
        if steps.top_p:
            logits = processors.drop_tail(logits, ordered, values["removed_mass"])
    if steps.min_p:
        logits = processors.min_p(logits, values["min_p"])
    return logits


@jax.jit
def row_keys(seeds: jax.Array, rows: jax.Array) -> jax.Array:
    """[B] random keys, each of (seed, row) alone; seeds and rows are [B] unsigned integers."""
    return jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(seeds, rows)


def choose(
    logits: jax.Array,
    history: TokenHistory,
    keys: jax.Array,
    index: jax.Array,
    steps: Steps,
    values: dict[str, Any],
    ops: PlatformOps = XLA,
) -> jax.Array:
    """Chooses a token for each row.

    The draw depends on the row's key, the token's number, the row's logits and its history, on
    nothing else: not on the batch, nor on padding.

    Args:
      logits: [B, V] of any float dtype.
      history: of the rows' tokens, as `Steps.empty_history` begins it.
      keys: [B] random keys, from `row_keys`.
      index: int32, how many tokens each row has generated so far.
      steps, values: of the Sampling.
      ops: the platform's form of argmax, for greedy choices; draws sort, on any platform.

    Returns:
      [B] int32; NO_TOKEN for a row that has a NaN or no finite maximum, or in which every token is
      ruled out.
    """
    has_choice = jnp.max(logits, axis=-1) > -jnp.inf  # False for NaN
    logits = process(logits, history, steps, values)
    if steps.bans:
        has_choice &= jnp.max(logits, axis=-1) > -jnp.inf
    if steps.draw:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
        tokens = jax.vmap(jax.random.categorical)(keys, logits)
    else:
        tokens = ops.argmax(logits)
    return jnp.where(has_choice, tokens, NO_TOKEN).astype(jnp.int32)


def _padded(length: int, step: int) -> int:
    return max(step, -(-length // step) * step)


def token_table(tokens: Sequence[int]) -> np.ndarray:
    """Tokens as an int32 array whose length grows in steps of 8, filled up with NO_TOKEN."""
    table = np.full(_padded(len(tokens), 8), NO_TOKEN, np.int32)
    table[: len(tokens)] = tokens
    return table
