"""Prefill and decode step are compiled once, whatever the lengths, values, seeds and stop ids."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax.generation import decode, generate
from moe_jax.parameters import from_arrays, to_arrays
from tests.moe_jax.generation.models import DRAWN, PROMPTS, tiny

pytestmark = pytest.mark.filterwarnings("error:Some donated buffers")


def compiled() -> tuple[int, int]:
    return decode.prefill._cache_size(), decode.decode._cache_size()


def test_one_compilation_serves_all_calls_of_a_batch_size():
    model, first = tiny(), {"sampling": DRAWN, "prefill_chunk": 16}
    generate(model, PROMPTS, max_new_tokens=20, **first)
    before = compiled()
    # other prompts and lengths of the same bucket
    generate(model, [[9] * 16, [1], [2, 3]], max_new_tokens=3, **first)
    # other values, seeds and stop ids
    values = {"temperature": 0.3, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 2.0}
    bans = {"bad_words_ids": [[3, 4, 5], [6, 7], [8]], "suppress_tokens": [9, 10]}
    second = dataclasses.replace(DRAWN, **values, **bans)
    second = {**first, "sampling": second, "seed": 8, "stop_ids": [5, 9]}
    generate(model, PROMPTS, max_new_tokens=20, **second)
    # more chunks of the same size, in a cache of the same size
    prompts = [[3] * 40, [4] * 20, [5]]
    generate(model, prompts, max_new_tokens=20, capacity=64, **first)
    # the same model from another checkpoint
    config = dataclasses.replace(model.config, extra={"transformers_version": "5.23.0"})
    generate(from_arrays(config, to_arrays(model)), PROMPTS, max_new_tokens=20, **first)
    assert compiled() == before
    assert min(before) > 0


def test_one_program_begins_a_call(monkeypatch):
    """An operation by itself would be compiled too, because nothing else has these shapes."""
    B, programs = 7, []

    def listen(event, seconds, *, fun_name=None, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(fun_name)

    def prefill(plan, inputs, state, ids, valid):
        last = decode.Sampled(np.arange(B, dtype=np.int32), np.ones(B, bool), np.int32(0))
        return decode.Step(last, state, None, None)

    model = tiny()
    monkeypatch.setattr(decode, "prefill", prefill)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        options = {"sampling": DRAWN, "seed": 3, "stop_ids": [5], "max_new_tokens": 1}
        made = generate(model, [[1, 2]] * B, capacity=61, **options)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert programs == ["jit(_begin)"]
    assert made.tokens == [[row] for row in range(B)]
