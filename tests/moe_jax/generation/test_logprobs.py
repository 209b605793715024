"""Log-probabilities of logits against NumPy; test_steps_per_dispatch.py has those of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.generation.logprobs import logprobs_of
from moe_jax.platform_ops import XLA, platform_ops


def log_softmax(logits) -> np.ndarray:
    """In float64, along the last axis."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("ops", [XLA, platform_ops("ascend")], ids=["xla", "portable"])
def test_of_logits_with_ties_and_bans(ops):
    logits = np.random.default_rng(0).normal(size=(4, 24)).astype(np.float32) * 4
    logits[1, 5:9] = logits[1].max() + 1
    logits[2, ::2] = -np.inf
    logits = jnp.asarray(logits, jnp.bfloat16)
    tokens = np.array([3, 7, 4, -1], np.int32)  # row 2's is ruled out; row 3 has none
    found = jax.jit(logprobs_of, static_argnums=(2, 3))(logits, tokens, 24, ops)
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
