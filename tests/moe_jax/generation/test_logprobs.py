"""Log-probabilities of generated tokens: NumPy's log-softmax of what the whole model says."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.generation import Sampling, collect, generate, stream
from moe_jax.generation.logprobs import logprobs_of
from moe_jax.platform_ops import XLA, platform_ops
from moe_jax.tokenization import ByteTokenizer
from tests.moe_jax.generation.models import PROMPTS, plain_logits, tiny

BYTES = ByteTokenizer(256)


def log_softmax(logits) -> np.ndarray:
    """In float64, along the last axis."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def assert_rows(made, n):
    """Each token has its log-probability and the n highest, from the raw logits at its place."""
    for prompt, tokens, found in zip(PROMPTS, made.tokens, made.logprobs, strict=True):
        assert len(found) == len(tokens)
        for place, (token, each) in enumerate(zip(tokens, found, strict=True)):
            expected = log_softmax(plain_logits(prompt + tokens[:place]))
            np.testing.assert_allclose(each.chosen, expected[token], atol=1e-4)
            ids, values = zip(*each.top, strict=True)
            assert len(set(ids)) == n
            np.testing.assert_allclose(values, np.sort(expected)[::-1][:n], atol=1e-4)
            np.testing.assert_allclose(values, expected[list(ids)], atol=1e-4)
            assert dict(each.top).get(token, each.chosen) == each.chosen


def test_raw_logits_and_ends():
    # Bans change what is chosen, not what is reported.
    likeliest = [int(plain_logits(prompt).argmax()) for prompt in PROMPTS]
    options = {"max_new_tokens": 12, "sampling": Sampling(suppress_tokens=likeliest)}
    options |= {"logprobs": 5, "tokenizer": BYTES}
    plain = generate(tiny(), PROMPTS, **options)
    others = plain.tokens[1] + plain.tokens[2]
    options["stop_ids"] = [next(token for token in plain.tokens[0][3:] if token not in others)]
    options["stop_strings"] = [BYTES.decode(plain.tokens[1][4:6])]
    events = list(stream(tiny(), PROMPTS, **options))
    made = collect(events, 3)
    assert sorted(made.finish_reasons) == ["length", "stop_id", "stop_string"]
    for index, row in enumerate(made.logprobs):
        assert row == [event.logprobs for event in events if event.row == index]
        assert row == plain.logprobs[index][: len(row)]
    assert_rows(made, 5)
    for row, banned in zip(made.logprobs, likeliest, strict=True):
        assert row[0].top[0][0] == banned
        assert row[0].chosen < row[0].top[0][1]


@pytest.mark.parametrize("ops", [XLA, platform_ops("ascend")], ids=["xla", "portable"])
def test_of_logits_with_ties_and_bans(ops):
    logits = np.random.default_rng(0).normal(size=(4, 24)).astype(np.float32) * 4
    logits[1, 5:9] = logits[1].max() + 1
    logits[2, ::2] = -np.inf
    logits = jnp.asarray(logits, jnp.bfloat16)
    tokens = np.array([3, 7, 4, -1], np.int32)  # row 2's is ruled out; row 3 has none
    found = logprobs_of(logits, jnp.asarray(tokens), 24, ops)
    expected = log_softmax(logits.astype(jnp.float32))
    order = np.argsort(-np.asarray(logits, np.float32), axis=-1, kind="stable")
    np.testing.assert_array_equal(found.top_ids, order)
    np.testing.assert_allclose(found.top, np.take_along_axis(expected, order, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(found.chosen[:3], expected[range(3), tokens[:3]], rtol=1e-5)
    assert found.chosen[2] == -np.inf
    assert found.chosen.dtype == found.top.dtype == jnp.float32


def test_the_chosen_alone():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(2, 24)), jnp.float32)
    found = logprobs_of(logits, jnp.array([3, 7]), 0)
    np.testing.assert_allclose(found.chosen, log_softmax(logits)[[0, 1], [3, 7]], rtol=1e-5)
    assert found.top.shape == found.top_ids.shape == (2, 0)
