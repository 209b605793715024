"""The portable form of each function against JAX's own: equal bits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.platform_ops import PORTABLE, XLA, platform_ops


def test_platforms():
    assert platform_ops("cpu") is platform_ops("cuda") is XLA
    assert platform_ops("ascend") is platform_ops("quantum") is PORTABLE


# Few values, so that many are equal; infinities too.
VALUES = st.sampled_from([-np.inf, -2.0, 0.0, 0.5, 0.5, 3.0, np.inf])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(VALUES, min_size=6, max_size=6), min_size=3, max_size=3), st.data())
def test_top_k_and_argmax_with_ties(rows, data):
    K = data.draw(st.integers(1, 6))
    scores = jnp.array(rows, jnp.float32)
    chex.assert_trees_all_equal(PORTABLE.top_k(scores, K), tuple(XLA.top_k(scores, K)))
    chex.assert_trees_all_equal(PORTABLE.argmax(scores), XLA.argmax(scores))


def test_top_k_of_random_scores():
    scores = jax.nn.softmax(jax.random.normal(jax.random.key(0), (64, 128)))
    chex.assert_trees_all_equal(PORTABLE.top_k(scores, 8), tuple(XLA.top_k(scores, 8)))


def test_nan_gives_nan_with_indices_inside():
    scores = jnp.array([[0.1, jnp.nan, 0.3], [0.3, 0.2, 0.1]])
    values, indices = PORTABLE.top_k(scores, 2)
    assert np.isnan(values[0]).all()
    assert (np.asarray(indices) < 3).all()
    np.testing.assert_array_equal(indices[1], [0, 1])
    np.testing.assert_array_equal(PORTABLE.argmax(scores), XLA.argmax(scores))


@pytest.mark.parametrize("S", [1, 5])
def test_running_count(S):
    flags = jax.random.bernoulli(jax.random.key(1), 0.6, (3, S))
    chex.assert_trees_all_equal(PORTABLE.running_count(flags), XLA.running_count(flags))


@jax.jit
def put_in_both_ways(stored, new, index):
    return PORTABLE.put(stored, new, index), XLA.put(stored, new, index)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("S", [1, 4])
def test_put(S, dtype):
    B, kv, C, D = 3, 2, 6, 4
    rng = np.random.default_rng(S)
    stored, new = (jnp.asarray(rng.normal(size=(B, kv, N, D)), dtype) for N in (C, S))
    index = rng.permuted(np.tile(np.arange(C, dtype=np.int32), (B, 1)), axis=1)[:, :S]
    index[0, 0] = C  # one is dropped
    found, expected = put_in_both_ways(stored, new, index)
    chex.assert_trees_all_equal(found, expected)
    # What is dropped may be NaN.
    poisoned, _ = put_in_both_ways(stored, new.at[0, :, 0].set(jnp.nan), index)
    chex.assert_trees_all_equal(poisoned, expected)
