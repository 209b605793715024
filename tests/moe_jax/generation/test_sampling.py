"""Choosing a token: against transformers' processors, properties, and errors."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_jax.generation import logits_processors as processors
from moe_jax.generation.logits_processors import NO_TOKEN, TokenHistory
from moe_jax.generation.sampling import Sampling, choose, process, row_keys

GOLDENS = np.load(pathlib.Path(__file__).with_name("sampling_goldens.npz"))
CASES = json.loads(str(GOLDENS["_cases"]))
V = 16

# All processors on, but none that changes more than token 0's logit: with other numbers in it, one
# compiled function serves several tests.
NEUTRAL = Sampling(
    temperature=1.0,
    top_k=8,
    top_p=0.999999,
    min_p=1e-9,
    repetition_penalty=1.001,
    no_repeat_ngram_size=2,
    bad_words_ids=[[1, 2]],
    suppress_tokens=[0],
)
jitted_choose = jax.jit(choose, static_argnames="steps")


def history_of(ids: np.ndarray, V: int) -> TokenHistory:
    """Rows of equal length, in places for more; what lies behind their ends must not matter."""
    B, length = ids.shape
    seen = np.zeros((B, V), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    stored = np.concatenate([ids, ids[:, :5]], axis=1)
    return TokenHistory(seen, stored, np.full(B, length, np.int32))


@pytest.fixture(scope="module")
def processed():
    """What `process` makes of each case, and its functions one by one of "all"; compiled once."""
    # A penalty alone is what transformers applies to a greedy choice, as here.
    asked = {name: Sampling(**{"temperature": 0.0, **case}) for name, case in CASES.items()}

    @jax.jit
    def run(logits, history, values):
        made = {name: process(logits, history, asked[name].steps, values[name]) for name in asked}
        return {**made, "one by one": one_by_one(logits, history, values["all"])}

    logits = GOLDENS["_logits"]
    history = history_of(GOLDENS["_ids"], logits.shape[1])
    return jax.device_get(run(logits, history, {name: asked[name].values() for name in asked}))


def one_by_one(logits, history, values):
    row = history.ids, history.lengths
    logits = processors.repetition_penalty(logits, history.seen, 1.2)
    logits = processors.no_repeat_ngrams(logits, *row, 2)
    words = values["bad_word_prefixes"], values["bad_word_ends"]
    logits = processors.bad_words(logits, *row, *words)
    logits = processors.suppress_tokens(logits, jnp.asarray([15, 40, 7]))
    logits = processors.temperature(logits, 0.7)
    logits = processors.top_k(logits, 12)
    logits = processors.top_p(logits, 0.9)
    return processors.min_p(logits, 0.02)


@pytest.mark.parametrize("name", [*CASES, "one by one"])
def test_process_as_transformers_does(name, processed):
    expected = GOLDENS["all" if name == "one by one" else name]
    for given_row, row, expected_row in zip(
        GOLDENS["_logits"], processed[name], expected, strict=True
    ):
        finite = given_row[np.isfinite(given_row)]
        if len(np.unique(finite)) < len(finite):
            # Which of equal logits stay is left open there; how many is not.
            row, expected_row = np.sort(row), np.sort(expected_row)
        np.testing.assert_array_equal(np.isfinite(row), np.isfinite(expected_row))
        np.testing.assert_allclose(row, expected_row, rtol=1e-6)


def test_top_p_keeps_the_lower_ids_of_equal_logits():
    logits = np.full((3, V), -np.inf, np.float32)
    logits[0, :6] = [1, 2, 2, 1, 2, 1]
    logits[1:, :8] = 0
    kept = np.isfinite(_jitted("top_p")(logits, 0.3))
    assert [np.flatnonzero(row).tolist() for row in kept[:2]] == [[1, 2], [0, 1, 2]]
    kept = np.isfinite(_jitted("top_p")(logits, 0.6))
    assert [np.flatnonzero(row).tolist() for row in kept[:2]] == [[1, 2, 4], [0, 1, 2, 3, 4]]


def test_history_of_chunks_with_padding():
    ids = np.asarray([[9, 9, 1, 2], [9, 3, 9, 4], [5, 6, 7, 8]], np.int32)
    valid = np.asarray([[0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1]], bool)
    history = NEUTRAL.steps.empty_history(3, 10, 6)
    append = jax.jit(TokenHistory.append)
    for chunk in (slice(0, 3), slice(3, 4)):
        history = append(history, ids[:, chunk], valid[:, chunk])
    decoded = np.asarray([[2], [NO_TOKEN], [1]], np.int32), np.asarray([[1], [0], [1]], bool)
    history = append(history, *decoded)
    np.testing.assert_array_equal(history.lengths, [3, 2, 5])
    np.testing.assert_array_equal(
        history.ids, [[1, 2, 2, 0, 0, 0], [3, 4, 0, 0, 0, 0], [5, 6, 7, 8, 1, 0]]
    )
    seen = [np.flatnonzero(row).tolist() for row in history.seen]
    assert seen == [[1, 2], [3, 4], [1, 5, 6, 7, 8]]


def test_bans_look_at_a_rows_own_tokens_only():
    # Rows of 1, 2 and 4 tokens, and behind them what would repeat 5 6 and end the words.
    row = np.asarray([[5, 6, 5, 6], [6, 5, 6, 5], [5, 6, 0, 5]], np.int32), np.asarray([1, 2, 4])
    values = Sampling(bad_words_ids=[[6, 5, 1], [0, 5, 2], [5, 3]]).values()

    @jax.jit
    def run(logits, row, prefixes, ends):
        ngrams = processors.no_repeat_ngrams(logits, *row, 2)
        return jnp.isinf(ngrams), jnp.isinf(processors.bad_words(logits, *row, prefixes, ends))

    logits = np.zeros((3, 8), np.float32)
    made = run(logits, row, values["bad_word_prefixes"], values["bad_word_ends"])
    ngrams, words = ([np.flatnonzero(row).tolist() for row in banned] for banned in made)
    assert ngrams == [[], [], [6]]
    assert words == [[3], [1, 3], [2, 3]]


def test_a_stop_id_is_no_bad_word():
    asked = Sampling(bad_words_ids=[[3], [4], [3, 4]]).for_model(8, frozenset([3]))
    assert asked.bad_words_ids == ((4,), (3, 4))
    with pytest.raises(ValueError, match=r"bad_words_ids\[1\]\[0\] is 8; expected 0 to 7"):
        Sampling(bad_words_ids=[[3], [8]]).for_model(8)
    with pytest.raises(ValueError, match=r"suppress_tokens\[0\] is 8; expected 0 to 7"):
        Sampling(suppress_tokens=[8]).for_model(8)


rows = hnp.arrays(
    np.float32, (3, V), elements=st.floats(-20, 20, width=16)
)  # 16 bits, so that ties come up


@settings(deadline=None, max_examples=40)
@given(rows, st.integers(1, 2 * V))
def test_top_k_keeps_k_and_the_ties_of_the_last(logits, k):
    kept = np.isfinite(_jitted("top_k")(logits, k))
    for row, keeps in zip(logits, kept, strict=True):
        border = np.sort(row)[-min(k, V)]
        np.testing.assert_array_equal(keeps, row >= border)


@settings(deadline=None, max_examples=40)
@given(rows, st.floats(0, 0.999))
def test_top_p_keeps_a_smallest_set_that_reaches_p(logits, p):
    kept = np.isfinite(_jitted("top_p")(logits, p))
    for row, keeps in zip(logits.astype(np.float64), kept, strict=True):
        weights = np.exp(row - row.max())
        weights /= weights.sum()
        assert keeps.any()
        assert weights[keeps].sum() >= p - 1e-5
        if keeps.sum() > 1:  # without its least likely member the set misses p
            assert weights[keeps].sum() - weights[keeps].min() <= p + 1e-5
        assert keeps.all() or row[~keeps].max() <= row[keeps].min()


@settings(deadline=None, max_examples=40)
@given(rows, st.floats(0, 1))
def test_min_p_keeps_the_likeliest(logits, p):
    kept = np.isfinite(_jitted("min_p")(logits, p))
    assert np.take_along_axis(kept, logits.argmax(axis=1)[:, None], axis=1).all()
    if p == 0:
        assert kept.all()


@functools.cache
def _jitted(name):
    return jax.jit(getattr(processors, name))


def keys_of(*seeds, rows=None):
    rows = range(len(seeds)) if rows is None else rows
    return row_keys(jnp.asarray(seeds, jnp.uint32), jnp.asarray(list(rows), jnp.uint32))


def drawn(logits, asked, keys, index=0, seen=None):
    logits = np.asarray(logits, np.float32)
    history = asked.steps.empty_history(*logits.shape, 4)
    if seen is not None:
        history = history._replace(seen=seen)
    made = jitted_choose(
        logits, history, keys, np.int32(index), steps=asked.steps, values=asked.values()
    )
    return np.asarray(made)


KEYS = keys_of(1, 2, 3, 4)


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = np.tile([0, 3, 3, 1, 0, 0, 3, 0], (4, 1))
    np.testing.assert_array_equal(drawn(logits, Sampling(), KEYS), [1] * 4)


def test_repetition_penalty_changes_a_greedy_choice():
    logits = np.tile([1.5, 2.0, 1.2, 0, 0, 0, 0, 0], (4, 1))
    seen = np.zeros((4, 8), bool)
    seen[:2, 1] = True
    made = drawn(logits, Sampling(repetition_penalty=2.0), KEYS, seen=seen)
    np.testing.assert_array_equal(made, [0, 0, 1, 1])


@pytest.mark.parametrize(
    "changes",
    [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-5}],
    ids=str,
)
def test_one_token_left_is_the_greedy_one(changes):
    logits = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    best = logits[:, 1:].argmax(axis=1) + 1  # token 0 is suppressed
    asked = dataclasses.replace(NEUTRAL, **changes)
    np.testing.assert_array_equal(drawn(logits, asked, KEYS), best)


def test_draws_follow_the_distribution():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    asked = Sampling(temperature=1.0, top_k=3)
    many = 4000
    tokens = drawn(np.tile(logits, (many, 1)), asked, keys_of(*[5] * many))
    share = np.bincount(tokens, minlength=4) / many
    np.testing.assert_allclose(share, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=0.03)


def test_a_row_depends_on_its_key_and_number_only():
    asked = Sampling(temperature=1.0)
    logits = np.random.default_rng(0).normal(size=(3, 512))
    together = drawn(logits, asked, keys_of(7, 7, 7))
    alone = [drawn(logits[row : row + 1], asked, keys_of(7, rows=[row])).item() for row in range(3)]
    np.testing.assert_array_equal(together, alone)
    draws = {
        token
        for seed in (0, 1, 2)
        for index in (0, 1, 2)
        for token in drawn(np.zeros((3, 512)), asked, keys_of(seed, seed, seed), index).tolist()
    }
    assert len(draws) > 20  # 27 independent draws of 512 tokens


@pytest.mark.parametrize("asked", [Sampling(), dataclasses.replace(NEUTRAL, top_p=0.9, top_k=3)])
def test_a_row_without_a_highest_logit_has_no_token(asked):
    logits = np.zeros((4, 8), np.float32)
    logits[0, 3] = np.nan
    logits[1] = -np.inf
    logits[2, 5] = np.inf
    logits[3, 7] = 100
    np.testing.assert_array_equal(drawn(logits, asked, KEYS), [NO_TOKEN, -1, 5, 7])


@pytest.mark.parametrize("asked", [Sampling(), NEUTRAL])
def test_a_row_in_which_all_is_banned_has_no_token(asked):
    asked = dataclasses.replace(asked, suppress_tokens=range(8))
    np.testing.assert_array_equal(drawn(np.zeros((4, 8)), asked, KEYS), [NO_TOKEN] * 4)


def test_bfloat16_logits_are_processed_in_float32():
    logits = jnp.asarray([[1.0, 1.0078125]], jnp.bfloat16)
    asked = Sampling(temperature=0.3)
    made = process(logits, TokenHistory(), asked.steps, asked.values())
    assert made.dtype == jnp.float32
    np.testing.assert_allclose(made, [[1 / 0.3, 1.0078125 / 0.3]], rtol=1e-6)


def test_numbers_may_be_numpys_and_jaxs():
    plain = Sampling(temperature=0.5, top_k=3, top_p=0.25, bad_words_ids=[[1, 2]])
    arrays = Sampling(
        temperature=np.float32(0.5),
        top_k=np.int64(3),
        top_p=jnp.bfloat16(0.25),
        min_p=np.array(0.0),
        repetition_penalty=jnp.float32(1),
        no_repeat_ngram_size=np.uint8(0),
        bad_words_ids=np.array([[1, 2]]),
        suppress_tokens=jnp.array([], jnp.int32),
    )
    assert arrays == plain and hash(arrays) == hash(plain) and arrays.steps == plain.steps
    with pytest.raises(TypeError, match=r"suppress_tokens\[1\] is 1.5; expected a whole number"):
        Sampling(suppress_tokens=[1, 1.5])


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("temperature", -1, "1e-05 to 100000 or 0 (greedy)"),
        ("temperature", float("nan"), "or 0 (greedy)"),
        ("temperature", "hot", "or 0 (greedy)"),
        ("temperature", 1e-50, "or 0 (greedy)"),
        ("temperature", np.float32(-1), "1e-05 to 100000 or 0 (greedy)"),
        ("temperature", jnp.array([0.5]), "1e-05 to 100000 or 0 (greedy)"),
        ("top_k", -1, "a whole number from 0 up"),
        ("top_k", 2.0, "a whole number"),
        ("top_k", True, "a whole number"),
        ("top_p", 1.5, "0 to 1 (off)"),
        ("top_p", None, "0 to 1 (off)"),
        ("min_p", -0.1, "0 to 1; 0 is off"),
        ("repetition_penalty", 0, "0.01 to 100; 1 is off"),
        ("no_repeat_ngram_size", -1, "a whole number from 0 up"),
    ],
)
def test_errors_name_field_value_and_range(field, value, accepted):
    with pytest.raises(ValueError) as raised:
        Sampling(**{field: value})
    for fragment in (field, repr(value), accepted):
        assert fragment in str(raised.value)
