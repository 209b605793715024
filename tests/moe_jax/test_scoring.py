"""Scores of texts against the whole model without a cache, one prediction at a time, in NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.parameters import from_arrays
from moe_jax.scoring import Scorer, score
from moe_jax.scoring.scorer import kl_divergence
from moe_jax.scoring.texts import perplexity, windows
from tests.moe_jax.parity.golden import golden
from tests.moe_jax.parity.golden import model_of as golden_model
from tests.moe_jax.tiny import TINY, model_of, random_arrays, run

# A donation that XLA cannot use would leave two caches in memory.
pytestmark = pytest.mark.filterwarnings("error:Some donated buffers")

CONFIG = dataclasses.replace(TINY, num_hidden_layers=1)
CONTEXT, STRIDE = 8, 3
# One is a window and a bit, one has a single prediction, one is a window exactly.
TEXTS = [np.random.default_rng(length).integers(0, 512, length).tolist() for length in (23, 2, 9)]
OPTIONS = {"context": CONTEXT, "stride": STRIDE, "batch": 4, "chunk": 3}


def model(seed=3):
    return model_of(CONFIG) if seed == 3 else from_arrays(CONFIG, random_arrays(CONFIG, seed=seed))


def log_softmax(logits) -> np.ndarray:
    """In float64, along the last axis."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def begins(N: int) -> dict[int, int]:
    """For each token from 1 on, where its window begins: by counting windows up to its own."""
    found, token = {}, 1
    while token < N:
        last = min(N - 1, CONTEXT if token == 1 else token + STRIDE - 1)
        found |= dict.fromkeys(range(token, last + 1), max(0, last - CONTEXT))
        token = last + 1
    return found


def plain(scored_model, text) -> np.ndarray:
    """[N - 1, V] float64: log-probabilities after each token's context, each by itself."""
    ids, mask = np.zeros((2, 24, CONTEXT), np.int32)
    for token, begin in begins(len(text)).items():
        ids[token, : token - begin] = text[begin:token]
        mask[token, : token - begin] = 1
    logits = run(scored_model, jnp.asarray(ids), mask=jnp.asarray(mask)).logits
    lengths = mask.sum(axis=1)[1 : len(text)]
    return log_softmax(np.asarray(logits)[range(1, len(text)), lengths - 1])


def assert_scores(found, models):
    """The scores are those of `plain`, for each text and scorer."""
    for scores, text in zip(found, TEXTS, strict=True):
        own = begins(len(text))
        np.testing.assert_array_equal(scores.token_ids, text)
        np.testing.assert_array_equal(scores.contexts, [0, *(t - b for t, b in own.items())])
        assert np.isnan(scores.logprobs[:, 0]).all() and (scores.top_ids[:, 0] == -1).all()
        expected = [plain(each, text) for each in models]
        for scorer, log_p in enumerate(expected):
            chosen = log_p[range(len(own)), text[1:]]
            np.testing.assert_allclose(scores.logprobs[scorer, 1:], chosen, atol=1e-4)
            np.testing.assert_array_equal(scores.top_ids[scorer, 1:], log_p.argmax(axis=-1))
            assert scores.log_likelihood(scorer) == pytest.approx(chosen.sum(), rel=1e-5)
            assert scores.perplexity(scorer) == pytest.approx(math.exp(-chosen.mean()), rel=1e-4)
        if len(models) == 2:
            kl = (np.exp(expected[0]) * (expected[0] - expected[1])).sum(axis=-1)
            np.testing.assert_allclose(scores.kl[1:], kl, rtol=1e-3)
            assert np.isnan(scores.kl[0])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_windows_batches_and_padding(phase):
    calls = []
    scorer = Scorer(model=model(), phase=phase)
    found = score([scorer], TEXTS, on_batch=lambda *call: calls.append(call), **OPTIONS)
    assert_scores(found, [model()])
    assert found[0].kl is None
    assert calls == [(0, 2), (1, 2)]  # 6 + 1 + 1 windows
    assert scorer.backends == {"layers": "blocks", "experts": "portable", "attention": "xla"}


def test_two_models_side_by_side():
    models = [model(), model(seed=4)]
    found = score([Scorer(model=each) for each in models], TEXTS, **OPTIONS)
    assert_scores(found, models)
    assert found[0].kl[1:].min() > 0.1


def test_prefill_beside_decode():
    found = score([Scorer(model=model(), phase=p) for p in ("prefill", "decode")], TEXTS, **OPTIONS)
    for scores in found:
        np.testing.assert_allclose(*scores.logprobs, atol=1e-4)
        np.testing.assert_array_equal(*scores.top_ids)
        assert (scores.kl[1:] >= 0).all() and scores.kl[1:].max() < 1e-9


def test_whole_windows_in_one_batch_have_transformers_log_probabilities():
    found = golden("num_hidden_layers")
    ids = found.inputs["input_ids"]
    made = score(
        [Scorer(model=golden_model("num_hidden_layers"))], ids, context=16, stride=16, chunk=6
    )
    expected = log_softmax(found.outputs["logits"])[:, :-1]
    for scores, log_p, row in zip(made, expected, ids, strict=True):
        chosen = log_p[range(len(row) - 1), row[1:]]
        np.testing.assert_allclose(scores.logprobs[0, 1:], chosen, atol=1e-4)


def test_every_token_is_in_one_window_that_is_as_long_as_it_may_be():
    for N in range(2, 20):
        for context in range(1, 9):
            for stride in range(1, context + 1):
                found = windows(N, context, stride)
                scored = [token for each in found for token in range(each.first, each.end)]
                assert scored == list(range(1, N))
                for each in found:
                    assert each.begin < each.first
                    assert each.end - 1 - each.begin == min(context, N - 1)
                    assert each.end - each.first <= (context if each == found[0] else stride)


def test_kl_divergence_of_far_and_of_near_distributions():
    random = np.random.default_rng(0)
    first = (random.normal(size=(6, 300)) * 3).astype(np.float32)
    second = first + (random.normal(size=first.shape) * 1e-3).astype(np.float32)
    second[1] = first[1] + 40  # the same
    second[2] = np.roll(first[2], 7)
    first[3, 0], second[3, 0] = 120, -120  # so that p is 0 in float32, and so is q
    first[4, 5] = second[4, 5] = -np.inf
    second[5, 5] = -np.inf
    log_p, log_q = log_softmax(first), log_softmax(second)
    with np.errstate(invalid="ignore"):
        terms = np.exp(log_p) * (log_p - log_q)
    expected = np.where(np.isneginf(log_p), 0, terms).sum(axis=-1)
    found = jax.jit(kl_divergence)(*(jnp.asarray(each, jnp.float32) for each in (log_p, log_q)))
    assert found[5] == np.inf
    np.testing.assert_allclose(found[:5], expected[:5], rtol=2e-3, atol=1e-12)


def test_wrong_arguments():
    scorer = Scorer(model=model())
    wrong = {
        "scorers has 3; expected one, or two": ({}, [scorer] * 3),
        r"texts\[1\] has 1 tokens; expected at least 2": ({"texts": [[1, 2], [3]]}, None),
        r"texts\[0\]\[1\] is 512; expected 0 to 511": ({"texts": [[1, 512]]}, None),
        "context is 2000; expected a whole number from 1 to 1024, as max_p": (
            {"context": 2000},
            None,
        ),
        "stride is 9; expected a whole number from 1 to 8, as the context": ({"stride": 9}, None),
        "chunk is 1; expected a whole number from 2 up": ({"chunk": 1}, None),
        "batch is 0; expected a whole number from 1": ({"batch": 0}, None),
    }
    for message, (changes, scorers) in wrong.items():
        options = {"texts": TEXTS} | OPTIONS | changes
        with pytest.raises(ValueError, match=message):
            score(scorers or [scorer], options.pop("texts"), **options)
    with pytest.raises(ValueError, match="phase is 'both'; expected one of prefill, decode"):
        Scorer(model=model(), phase="both")
    other = from_arrays(*_smaller_vocabulary())
    with pytest.raises(ValueError, match=r"scorers have vocab_size \[512, 300\]; expected models"):
        score([scorer, Scorer(model=other)], TEXTS, **OPTIONS)


def _smaller_vocabulary():
    config = dataclasses.replace(CONFIG, vocab_size=300)
    return config, random_arrays(config)


def test_a_layout_goes_to_the_kernels():
    lowered = from_arrays(CONFIG, random_arrays(CONFIG, dtype="bfloat16"))
    scorer = Scorer(model=lowered, experts_backend="pallas_interpret", layout="by_hand")
    with pytest.raises(ValueError, match="layout is 'by_hand'; expected 'auto', 'invariant' or on"):
        score([scorer], TEXTS, **OPTIONS)


def test_nan_is_an_error_that_names_text_and_token():
    arrays = random_arrays(CONFIG)
    token = TEXTS[0][12]
    assert TEXTS[0].index(token) == 12 and token not in TEXTS[1] + TEXTS[2]
    spoilt = from_arrays(
        CONFIG,
        arrays | {"embed_tokens.weight": arrays["embed_tokens.weight"].at[token].set(jnp.nan)},
    )
    with pytest.raises(
        FloatingPointError, match=r"texts\[0\]: .* token 13 are NaN in scorers\[0\]"
    ):
        score([Scorer(model=spoilt)], TEXTS, **OPTIONS)


def test_perplexity():
    assert perplexity(-2 * math.log(7), 2) == pytest.approx(7)
    assert perplexity(-1e6, 2) == math.inf
