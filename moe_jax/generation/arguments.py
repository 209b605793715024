"""The arguments of `stream`: checked, and the prompts padded on the left into one array."""

import operator
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import Qwen3MoeConfig

SMALLEST_BUCKET = 16


def check_prompts(
    prompts: Sequence[Sequence[int]], config: Qwen3MoeConfig, max_new_tokens: int
) -> list[np.ndarray]:
    """The prompts as int32 arrays.

    Raises:
      ValueError: there is no prompt, one is empty, an id is outside the vocabulary, or prompt and
        new tokens are more than the model has positions for.
      TypeError: an id is no whole number.
    """
    whole_number("max_new_tokens", max_new_tokens, least=1)
    if isinstance(prompts, (str, bytes)) or len(prompts) == 0:
        raise ValueError(f"prompts is {prompts!r}; expected at least one row of token ids")
    return [_check_prompt(row, ids, config, max_new_tokens) for row, ids in enumerate(prompts)]


def _check_prompt(row: int, ids: Sequence[int], config: Qwen3MoeConfig, new: int) -> np.ndarray:
    if isinstance(ids, (str, bytes)) or not hasattr(ids, "__len__"):
        raise TypeError(f"prompts[{row}] is {ids!r}; expected a sequence of token ids")
    if len(ids) == 0:
        raise ValueError(f"prompts[{row}] is empty; expected at least one token id")
    V = config.vocab_size
    for place, value in enumerate(ids):
        try:
            inside = 0 <= operator.index(value) < V
        except TypeError:
            raise TypeError(
                f"prompts[{row}][{place}] is {value!r}; expected a whole number"
            ) from None
        if not inside:
            raise ValueError(
                f"prompts[{row}][{place}] is {value}; expected 0 to {V - 1}, as vocab_size is {V}"
            )
    limit = position_limit(config)
    if limit is not None and len(ids) + new > limit:
        raise ValueError(
            f"prompts[{row}] has {len(ids)} tokens and max_new_tokens is {new}; expected at most "
            f"max_position_embeddings = {limit} together"
        )
    return np.asarray(ids, np.int32)


def position_limit(config: Qwen3MoeConfig) -> int | None:
    """The most tokens that a row may have; None for RoPE kinds that are made to go further.

    How far yarn or another of them is any good is for whoever set it up to know.
    """
    return config.max_position_embeddings if config.rope.kind == "default" else None


def padded_length(longest: int, chunk: int) -> int:
    """How many columns the prompts get, so that few shapes are ever compiled.

    A power of two from SMALLEST_BUCKET up to the chunk; multiples of the chunk beyond it.
    """
    if longest > chunk:
        return -(-longest // chunk) * chunk
    return min(chunk, max(SMALLEST_BUCKET, 1 << (longest - 1).bit_length()))


def pad_left(prompts: Sequence[np.ndarray], columns: int) -> tuple[np.ndarray, np.ndarray]:
    """[B, columns] int32 ids and bool validity; every row's last token is in the last column."""
    ids = np.zeros((len(prompts), columns), np.int32)
    valid = np.zeros(ids.shape, bool)
    for row, prompt in enumerate(prompts):
        ids[row, columns - len(prompt) :] = prompt
        valid[row, columns - len(prompt) :] = True
    return ids, valid


def cache_capacity(columns: int, max_new_tokens: int, asked: int | None, longest: int) -> int:
    """The tokens that a row of the cache holds: as asked, or enough for every prompt of this shape.

    Raises:
      ValueError: less is asked for than the longest row needs.
    """
    if asked is None:
        return -(-(columns + max_new_tokens) // 64) * 64
    whole_number("capacity", asked, least=1)
    if longest + max_new_tokens > asked:
        raise ValueError(
            f"capacity is {asked}; expected at least {longest + max_new_tokens}: the longest "
            f"prompt has {longest} tokens and max_new_tokens is {max_new_tokens}"
        )
    return asked


def check_token_ids(name: str, ids: Sequence[int], V: int | None = None) -> tuple[int, ...]:
    """Token ids as Python's numbers.

    Args:
      name: the argument.
      ids: whole numbers from 0 up, of any kind.
      V: the vocabulary's size, which they must be below; None for any.

    Raises:
      ValueError: one is negative, or outside the vocabulary.
      TypeError: `ids` is no sequence, or has something else than whole numbers.
    """
    if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Iterable):
        raise TypeError(f"{name} is {ids!r}; expected a sequence of token ids")
    numbers = []
    for place, value in enumerate(ids):
        try:
            number = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}[{place}] is {value!r}; expected a whole number") from None
        if number < 0 or (V is not None and number >= V):
            accepted = "0 or more" if V is None else f"0 to {V - 1}, as vocab_size is {V}"
            raise ValueError(f"{name}[{place}] is {number}; expected {accepted}")
        numbers.append(number)
    return tuple(numbers)


def check_words(name: str, words: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Sequences of token ids, none of them empty.

    Raises:
      ValueError, TypeError: as check_token_ids does; ValueError too for an empty word.
    """
    if isinstance(words, (str, bytes, Mapping)) or not isinstance(words, Iterable):
        raise TypeError(f"{name} is {words!r}; expected a sequence of sequences of token ids")
    made = tuple(check_token_ids(f"{name}[{place}]", word) for place, word in enumerate(words))
    if () in made:
        raise ValueError(f"{name}[{made.index(())}] is empty; expected at least one token id")
    return made


def check_seed(seed: int | Sequence[int], B: int) -> tuple[jax.Array, jax.Array]:
    """[B] seeds and [B] places, from which each row's key is made.

    Raises:
      ValueError: a seed is no unsigned number of 32 bits, or there is not one for each row.
    """
    alone = isinstance(seed, (int, np.integer))
    seeds = [seed] * B if alone else list(seed)
    if len(seeds) != B:
        raise ValueError(
            f"seed has {len(seeds)} numbers; expected one, or one for each of {B} rows"
        )
    for value in seeds:
        if not isinstance(value, (int, np.integer)) or not 0 <= value < 2**32:
            raise ValueError(f"seed is {value!r}; expected 0 to {2**32 - 1}")
    places = np.arange(B) if alone else np.zeros(B)
    return jnp.asarray(seeds, jnp.uint32), jnp.asarray(places, jnp.uint32)


def whole_number(name: str, value: int, least: int) -> None:
    """Raises a ValueError unless value is a whole number from `least` up."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; expected a whole number from {least} up")
