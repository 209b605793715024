"""Greedy generation, token by token, against transformers' generate."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.cache import init_cache
from tests.moe_jax.goldens.cases import CASES
from tests.moe_jax.parity.golden import CAPACITY, assert_close, golden, model_of


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.new_tokens])
def test_generate(name):
    found = golden(name)
    model, N, S = model_of(name), found.case.new_tokens, found.case.length
    mask = jnp.asarray(found.valid.astype(np.int32))
    cache = init_cache(model.config, len(mask), CAPACITY, jnp.float32)
    if model.config.window is not None:
        # a row starts within the window and ends beyond it
        assert found.valid.sum(axis=1).min() < model.config.window < S + N
    out = model(
        jnp.asarray(found.inputs["input_ids"]),
        attention_mask=mask,
        cache=cache,
        logits_to_keep=1,
    )
    tokens, logits = [], []
    for _ in range(N):
        logits.append(out.logits[:, -1])
        tokens.append(jnp.argmax(logits[-1], axis=-1))
        out = model(tokens[-1][:, None], cache=out.cache)
    np.testing.assert_array_equal(jnp.stack(tokens, axis=1), found.outputs["tokens"])
    assert_close(jnp.stack(logits, axis=1), found.outputs["token_logits"])


def test_generated_tokens_vary():
    # a model that repeats one token would show little
    for name in (name for name, case in CASES.items() if case.new_tokens):
        assert len(np.unique(golden(name).outputs["tokens"])) >= 6
