"""The grouped products as a backend: values and gradients against the float32 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moe_jax.experts import ExpertWeights, experts, grouped_pallas
from tests.moe_jax.scaled_weights import dequantised, quantised
from tests.pallas_kernels.machine import INTERPRET, examples

T, K, E, H, I = 45, 3, 3, 128, 128
BACKEND = "grouped_pallas_interpret" if INTERPRET else "grouped_pallas"


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.bfloat16)


X, TARGET = normal(0, T, H), normal(1, T, H)
WEIGHTS = ExpertWeights(
    gate_up=normal(2, E, 2, I, H, scale=H**-0.5), down=normal(3, E, H, I, scale=I**-0.5)
)
ROUTING_WEIGHTS = jnp.asarray(np.random.default_rng(4).random((T, K)), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(backend, x, weights, ids, expert_weights):
    """[T, H], and the gradients of its sum with TARGET to x, weights and expert_weights."""

    def loss(x, weights, expert_weights):
        y = experts(x, weights, ids, expert_weights, backend=backend, phase="training")
        return jnp.sum(y.astype(jnp.float32) * TARGET.astype(jnp.float32)), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
        x, weights, expert_weights
    )
    return y, gradients


# As many examples as a slow interpreter allows; test_groups.py draws many more of the layout.
@examples(on_cpu=1, on_gpu=30)
@given(st.lists(st.integers(-1, E), min_size=T * K, max_size=T * K))
@example([1] * (T * K))  # an expert twice in a token, of two tiles, and no other
def test_values_and_gradients(ids):
    ids = np.array(ids, np.int32).reshape(T, K)
    padding = (ids < 0) | (ids >= E)
    unused = np.setdiff1d(np.arange(E), ids)
    arguments = (
        jnp.where(padding.all(axis=1)[:, None], jnp.nan, X),
        WEIGHTS,
        ids,
        jnp.where(padding, jnp.inf, ROUTING_WEIGHTS),
    )
    # From float32 weights, because their gradients would be added up in bfloat16 otherwise.
    x, weights = jax.tree.map(lambda a: a.astype(jnp.float32), arguments[:2])
    expected = value_and_gradients("reference", x, weights, *arguments[2:])
    gate_up = WEIGHTS.gate_up.at[unused].set(jnp.nan)
    poisoned = arguments[0], ExpertWeights(gate_up=gate_up, down=WEIGHTS.down), *arguments[2:]
    found = value_and_gradients(BACKEND, *poisoned)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.linalg.norm(one - other) <= 6e-3 * np.linalg.norm(other)
    y, (of_x, of_weights, of_expert_weights) = jax.tree.map(np.asarray, found)
    for nothing in (
        y[padding.all(axis=1)],
        of_x[padding.all(axis=1)],
        of_weights.gate_up[unused],
        of_weights.down[unused],
        of_expert_weights[padding],
    ):
        assert not nothing.any()


@pytest.mark.skipif(not INTERPRET, reason="looks at the interpreted backend")
def test_it_is_the_gradient_of_the_decode_kernels():
    ids = np.zeros((T, K), np.int32)

    def loss(weights):
        return experts(X, weights, ids, ROUTING_WEIGHTS, backend="pallas_interpret").sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(WEIGHTS))
    for kernel in ("grouped_swiglu", "grouped_matmul_transposed", "grouped_matmul_to_weights"):
        assert kernel in text


def test_quantised_weights_are_dequantised_before_the_products(monkeypatch):
    scaled = jax.tree.map(lambda weight: quantised(weight, (128, 48)), WEIGHTS)
    taken = []

    def product(rows, weight, *operands, **options):
        taken.append(weight)
        return jnp.zeros((rows.shape[0], weight.shape[-2]), rows.dtype)

    monkeypatch.setattr(grouped_pallas, "grouped_swiglu", product)
    monkeypatch.setattr(grouped_pallas, "grouped_matmul", product)
    experts(X, scaled, np.zeros((T, K), np.int32), ROUTING_WEIGHTS, backend=BACKEND)
    for weight, stored in zip(taken, (scaled.gate_up, scaled.down), strict=True):
        assert weight.dtype == jnp.bfloat16
        np.testing.assert_array_equal(weight, dequantised(stored, jnp.bfloat16))
