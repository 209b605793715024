"""Losses against hand-made values and plain numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import losses

E, K = 6, 2

# One program each, and not one for each operation.
cross_entropy = jax.jit(losses.cross_entropy)
load_balancing_loss = jax.jit(losses.load_balancing_loss, static_argnums=1)
load_balancing_loss_per_layer = jax.jit(losses.load_balancing_loss_per_layer, static_argnums=1)
router_z_loss = jax.jit(losses.router_z_loss)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def layers(count=3, T=10):
    return tuple(normal(T, E, seed=seed) * 2 for seed in range(count))


def balance_in_numpy(logits, valid):
    """The definition, pooled over all rows that count."""
    rows = np.concatenate([np.asarray(layer, np.float64)[valid] for layer in logits])
    p = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
    top = np.argsort(-p, axis=1)[:, :K]
    f = np.bincount(top.ravel(), minlength=E) / len(rows)
    return E * np.sum(f * p.mean(0))


def test_a_uniform_router_gives_K():
    # Nearly uniform, each expert chosen equally often.
    logits = 1e-4 * sum(jnp.roll(jnp.eye(E), shift, axis=1) for shift in range(K))
    np.testing.assert_allclose(load_balancing_loss((logits,), K), K, rtol=1e-4)


def test_one_expert_that_takes_all_gives_E():
    logits = jnp.zeros((5, E)).at[:, 3].set(40.0)
    np.testing.assert_allclose(load_balancing_loss((logits,), 1), E, rtol=1e-6)


@pytest.mark.parametrize("padded", [0, 4])
def test_balance_is_the_pooled_definition(padded):
    logits, valid = layers(), np.arange(10) >= padded
    expected = balance_in_numpy(logits, valid)
    np.testing.assert_allclose(load_balancing_loss(logits, K, jnp.asarray(valid)), expected, 1e-5)
    per_layer = [balance_in_numpy((layer,), valid) for layer in logits]
    np.testing.assert_allclose(
        load_balancing_loss_per_layer(logits, K, jnp.asarray(valid)), per_layer, 1e-5
    )


def test_padding_changes_nothing_when_masked():
    logits = layers()
    padded = tuple(jnp.concatenate([layer, jnp.full((4, E), jnp.nan)]) for layer in logits)
    valid = jnp.arange(14) < 10
    np.testing.assert_allclose(
        load_balancing_loss(padded, K, valid), load_balancing_loss(logits, K), rtol=1e-6
    )
    np.testing.assert_allclose(router_z_loss(padded, valid), router_z_loss(logits), rtol=1e-6)


def test_pooling_hides_what_per_layer_shows():
    halves = [jnp.zeros((8, 4)).at[:, first : first + 2].set(9.0) for first in (0, 2)]
    np.testing.assert_allclose(load_balancing_loss(halves, 2), 2, rtol=1e-3)
    np.testing.assert_allclose(load_balancing_loss_per_layer(halves, 2), [4, 4], rtol=1e-3)


def test_z_loss_is_the_definition():
    logits = layers()
    rows = np.concatenate([np.asarray(layer, np.float64) for layer in logits])
    expected = np.mean(np.log(np.exp(rows).sum(1)) ** 2)
    np.testing.assert_allclose(router_z_loss(logits), expected, rtol=1e-5)


@pytest.mark.parametrize("loss", [load_balancing_loss, load_balancing_loss_per_layer])
def test_no_layer(loss):
    with pytest.raises(ValueError, match="logits has no layer"):
        loss((), K)


def test_cross_entropy_shifts_and_ignores():
    logits = normal(2, 5, 7)
    labels = jnp.array([[-100, -100, 3, 6, -100], [1, 2, -100, 0, 5]])
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    pairs = [
        (row, s, int(labels[row, s + 1]))
        for row in range(2)
        for s in range(4)
        if labels[row, s + 1] != -100
    ]
    expected = -np.mean([log_p[pair] for pair in pairs])
    np.testing.assert_allclose(cross_entropy(logits, labels), expected, rtol=1e-6)


def test_cross_entropy_is_float32_whatever_the_logits_are():
    logits = normal(1, 4, 7).astype(jnp.bfloat16)
    labels = jnp.array([[0, 1, 2, 3]])
    loss = cross_entropy(logits, labels)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, cross_entropy(logits.astype(jnp.float32), labels), rtol=1e-6)


def test_cross_entropy_of_nothing_is_nan_and_so_is_a_label_out_of_range():
    logits = jnp.zeros((1, 3, 4))
    assert np.isnan(cross_entropy(logits, jnp.full((1, 3), -100)))
    assert np.isnan(cross_entropy(logits, jnp.array([[0, 1, 4]])))
