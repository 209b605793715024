"""The arguments of `stream` and `Sampling`: checked, and the prompts padded on the left.

Numbers may be Python's, NumPy's or JAX's; every error names the argument, its value and what is
accepted.
"""

import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.config import Qwen3MoeConfig

SMALLEST_BUCKET = 16
LARGEST_SEED = 2**32 - 1


def check_prompts(
    prompts: Sequence[Sequence[int]], config: Qwen3MoeConfig, max_new_tokens: int
) -> list[np.ndarray]:
    """The prompts as int32 arrays.

    Raises:
      ValueError: there is no prompt, one is empty, an id is outside the vocabulary, or prompt and
        new tokens are more than the model has positions for.
      TypeError: prompts is no sequence of sequences, or an id is no whole number.
    """
    _expect_sequence("prompts", prompts, "at least one row of token ids")
    if len(prompts) == 0:
        raise ValueError(f"prompts is {prompts!r}; expected at least one row of token ids")
    return [_check_prompt(row, ids, config, max_new_tokens) for row, ids in enumerate(prompts)]


def _check_prompt(row: int, ids: Sequence[int], config: Qwen3MoeConfig, new: int) -> np.ndarray:
    name = f"prompts[{row}]"
    _expect_sequence(name, ids, "a sequence of token ids")
    if len(ids) == 0:
        raise ValueError(f"{name} is empty; expected at least one token id")
    tokens = token_array(name, ids, config.vocab_size)
    limit = position_limit(config)
    if limit is not None and len(tokens) + new > limit:
        raise ValueError(
            f"{name} has {len(tokens)} tokens and max_new_tokens is {new}; expected at most "
            f"max_position_embeddings = {limit} together"
        )
    return tokens


def token_array(name: str, ids: Sequence[int], V: int) -> np.ndarray:
    """Token ids below V as [N] int32; raises as check_token_ids does."""
    tokens = _plain_ids(ids, V)
    return np.asarray(check_token_ids(name, ids, V), np.int32) if tokens is None else tokens


def _plain_ids(ids: Sequence[int], V: int) -> np.ndarray | None:
    """[N] int32, ids checked all at once, because one by one 16384 of them take 3.5 ms.

    Returns:
      None for what check_token_ids is to look at: no plain integers, or one outside [0, V).
    """
    if type(ids) in (list, tuple) and set(map(type, ids)) == {int}:
        # Objects where one has more than 64 bits.
        array = np.asarray(ids)
    elif type(ids) is np.ndarray and ids.ndim == 1:
        array = ids
    else:
        return None
    if array.dtype.kind not in "iu" or not array.size:
        return None
    plain = array.min() >= 0 and array.max() < V
    return array.astype(np.int32) if plain else None


def position_limit(config: Qwen3MoeConfig) -> int | None:
    """The most tokens that a row may have; None for RoPE kinds that are made to go further.

    How far yarn or another of them is any good depends on the checkpoint.
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
    asked = whole_number("capacity", asked, least=1)
    if longest + max_new_tokens > asked:
        raise ValueError(
            f"capacity is {asked}; expected at least {longest + max_new_tokens}: the longest "
            f"prompt has {longest} tokens and max_new_tokens is {max_new_tokens}"
        )
    return asked


def check_token_ids(name: str, ids: Iterable[int], V: int | None = None) -> tuple[int, ...]:
    """Token ids as Python's numbers.

    Args:
      name: the argument.
      ids: whole numbers from 0 up.
      V: the vocabulary's size, which they must be below; None for any.

    Raises:
      ValueError: one is negative, or outside the vocabulary.
      TypeError: `ids` is not iterable, or has something else than whole numbers.
    """
    _expect_iterable(name, ids, "a sequence of token ids")
    # One copy of a JAX array, instead of one for each of its numbers.
    values = np.asarray(ids) if isinstance(ids, jax.Array) else ids
    made = []
    for place, value in enumerate(values):
        number = _as_index(value)
        if number is None:
            raise TypeError(f"{name}[{place}] is {value!r}; expected a whole number")
        if number < 0 or (V is not None and number >= V):
            accepted = "0 or more" if V is None else f"0 to {V - 1}, as vocab_size is {V}"
            raise ValueError(f"{name}[{place}] is {number}; expected {accepted}")
        made.append(number)
    return tuple(made)


def check_words(name: str, words: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    """Sequences of token ids, none of them empty.

    Raises:
      ValueError, TypeError: as check_token_ids does; ValueError too for an empty word.
    """
    _expect_iterable(name, words, "a sequence of sequences of token ids")
    made = tuple(check_token_ids(f"{name}[{place}]", word) for place, word in enumerate(words))
    if () in made:
        raise ValueError(f"{name}[{made.index(())}] is empty; expected at least one token id")
    return made


def check_seed(seed: int | Sequence[int], B: int) -> tuple[np.ndarray, np.ndarray]:
    """[B] seeds and [B] places, uint32, from which each row's key is made.

    Raises:
      ValueError: a seed is no unsigned number of 32 bits, or there is not one for each row.
      TypeError: seed is neither a whole number nor a sequence of them.
    """
    accepted = f"0 to {LARGEST_SEED}"
    alone = _as_index(seed)
    if alone is not None:
        seeds, places = [alone] * B, np.arange(B)
    else:
        _expect_sequence("seed", seed, f"{accepted}, or a sequence with one for each row")
        seeds, places = [_as_index(value) for value in seed], np.zeros(B)
        if len(seeds) != B:
            raise ValueError(
                f"seed has {len(seeds)} numbers; expected one, or one for each of {B} rows"
            )
    for place, value in enumerate(seeds):
        if value is None or not 0 <= value <= LARGEST_SEED:
            found = f"seed is {alone}" if alone is not None else f"seed[{place}] is {seed[place]!r}"
            raise ValueError(f"{found}; expected {accepted}")
    return np.asarray(seeds, np.uint32), np.asarray(places, np.uint32)


def whole_number(name: str, value: int, least: int, most: int | None = None, note="") -> int:
    """The value as Python's number.

    Args:
      name: the argument.
      value: from `least` to `most`, or up where `most` is None.
      least, most: the range.
      note: ends the message, behind the range.

    Raises:
      ValueError: it is no whole number in this range.
    """
    number = _as_index(value)
    if number is None or number < least or (most is not None and number > most):
        accepted = f"from {least} up" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}; expected a whole number {accepted}{note}")
    return number


def real_number(
    name: str, value: float, least: float, most: float, note: str, also: float | None = None
) -> float:
    """The value as Python's number.

    Args:
      name: the argument.
      value: from `least` to `most`.
      least, most: the range.
      note: ends the message, behind the range.
      also: one value more that is accepted.

    Raises:
      ValueError: it is no number in this range.
    """
    is_scalar = isinstance(value, (np.generic, np.ndarray, jax.Array)) and value.ndim == 0
    number = value.item() if is_scalar else value
    is_number = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not is_number or not (least <= number <= most or number == also):
        raise ValueError(f"{name} is {value!r}; expected {least:g} to {most:g}{note}")
    return number


def _as_index(value: Any) -> int | None:
    """A whole number of any kind as Python's; None for anything else, truth values included."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _expect_sequence(name: str, value: Any, accepted: str) -> None:
    is_sequence = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    if not is_sequence or getattr(value, "shape", None) == ():
        raise TypeError(f"{name} is {value!r}; expected {accepted}")
    _expect_iterable(name, value, accepted)


def _expect_iterable(name: str, value: Any, accepted: str) -> None:
    text_or_mapping = isinstance(value, (str, bytes, Mapping))
    if text_or_mapping or not isinstance(value, Iterable) or getattr(value, "shape", None) == ():
        raise TypeError(f"{name} is {value!r}; expected {accepted}")
