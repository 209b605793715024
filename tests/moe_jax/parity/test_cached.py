"""Passes over pieces of a row, with a cache between them: 1 token, 3 + 1 tokens, chunks."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.cache import init_cache
from tests.moe_jax.goldens.cases import CASES
from tests.moe_jax.parity.golden import CAPACITY, assert_close, golden, model_of

# Token by token: padding_gap and cached_window have the same rows standing still, or a window.
SLOW = {("cached", 0), ("padding_left", 0), ("padding_left_window", 0)}
PIECES = [
    pytest.param(
        name,
        i,
        id=f"{name}-{'+'.join(map(str, chunks))}",
        marks=[pytest.mark.slow] * ((name, i) in SLOW),
    )
    for name, case in CASES.items()
    for i, chunks in enumerate(case.chunks)
]


def logits_in_pieces(model, found, chunks):
    """Logits [B, S, V] of consecutive columns; padding is never stored."""
    # cut by numpy: jax would compile every slice
    ids, mask = found.inputs["input_ids"], found.valid.astype(np.int32)
    B, S = ids.shape
    cache = init_cache(model.config, B, CAPACITY, jnp.float32)
    logits, start = [], 0
    for length in chunks:
        columns = slice(start, start + length)
        out = model(
            jnp.asarray(ids[:, columns]), attention_mask=jnp.asarray(mask[:, columns]), cache=cache
        )
        cache, start = out.cache, columns.stop
        logits.append(np.asarray(out.logits))
    assert start == S
    np.testing.assert_array_equal(cache.lengths, found.valid.sum(axis=1))
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize(("name", "i"), PIECES)
def test_cached(name, i):
    found = golden(name)
    logits = logits_in_pieces(model_of(name), found, found.case.chunks[i])
    # Where frequencies depend on the length, transformers' cached passes differ from its whole one.
    expected = found.outputs[f"cached.{i}" if found.case.cached_differs else "logits"]
    assert_close(logits[found.valid], expected[found.valid])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_beyond_the_original_length_cached_and_whole_differ(kind):
    # or the cases above would not tell whose frequencies are used
    outputs = golden(f"rope_{kind}_beyond").outputs
    assert np.abs(outputs["cached.0"] - outputs["logits"]).max() > 0.01
