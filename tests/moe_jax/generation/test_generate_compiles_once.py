"""Prefill and decode step are compiled once, whatever the lengths, values, seeds and stop ids."""

import warnings

import chex
import jax
import pytest

from moe_jax.generation import Sampling, decode, generate
from tests.moe_jax.generation.models import PROMPTS, tiny


@pytest.fixture
def traced_once(monkeypatch):
    """The compiled functions, made anew so that a second trace is an error.

    So is a warning: of a donation that XLA cannot use, which would leave two caches in memory.
    """
    chex.clear_trace_counter()
    for name, function in (("prefill", decode._prefill), ("decode", decode._decode)):
        once = chex.assert_max_traces(function, n=1)
        monkeypatch.setattr(decode, name, jax.jit(once, **decode.JIT))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    chex.clear_trace_counter()


@pytest.mark.usefixtures("traced_once")
def test_one_compilation_serves_all_calls_of_a_batch_size():
    model = tiny()
    others = {"top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
    others |= {"no_repeat_ngram_size": 3, "bad_words_ids": [[1, 2]], "suppress_tokens": [3]}
    first = {"sampling": Sampling(temperature=1.0, **others), "prefill_chunk": 16}
    generate(model, PROMPTS, max_new_tokens=20, **first)
    # other prompts and lengths of the same bucket
    generate(model, [[9] * 16, [1], [2, 3]], max_new_tokens=3, **first)
    # other values, seeds and stop ids
    others |= {"bad_words_ids": [[3, 4, 5], [6, 7], [8]], "suppress_tokens": [9, 10]}
    second = Sampling(temperature=0.3, **others | {"top_k": 5, "top_p": 0.5})
    second = {**first, "sampling": second, "seed": 8, "stop_ids": [5, 9]}
    generate(model, PROMPTS, max_new_tokens=20, **second)
    # more chunks of the same size, in a cache of the same size
    prompts = [[3] * 40, [4] * 20, [5]]
    generate(model, prompts, max_new_tokens=20, capacity=64, **first)
    assert decode.decode._cache_size() == decode.prefill._cache_size() == 1
