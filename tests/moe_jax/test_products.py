"""Products of the whole model: what linear layers' gradients are, and of which numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers import linear
from moe_jax.products import linear_product


def draw(dtype, seed=0):
    """A layer's x [2, 3, 8] and weight [5, 8], and the cotangent of their product, [2, 3, 5]."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (2, 3, 8), (5, 8), (2, 3, 5)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_linear_layer_and_its_gradients(dtype):
    """Against float64; each is rounded once."""
    x, weight, cotangent = draw(dtype)
    y, pull = jax.vjp(linear, x, weight)
    found = (y, *pull(cotangent))
    x64, w64, c64 = (np.asarray(array, np.float64) for array in (x, weight, cotangent))
    expected = x64 @ w64.T, c64 @ w64, np.einsum("bso,bsi->oi", c64, x64)
    bound = {jnp.float32: 1e-6, jnp.bfloat16: 2**-8}[dtype]
    for array, exact in zip(found, expected, strict=True):
        assert array.dtype == dtype
        np.testing.assert_allclose(np.asarray(array, np.float64), exact, rtol=bound, atol=bound / 8)


def test_the_product_is_not_rounded():
    x, weight, _ = draw(jnp.bfloat16)
    assert linear_product(x, weight).dtype == jnp.float32


def test_gradients_of_bfloat16_are_products_of_bfloat16():
    """A widened operand would cost a GPU twice the time, and a copy of the weight."""
    x, weight, cotangent = draw(jnp.bfloat16)
    gradient = jax.jit(lambda x, weight, c: jax.vjp(linear, x, weight)[1](c))
    text = gradient.lower(x, weight, cotangent).as_text()
    operands = re.findall(r"stablehlo\.dot_general .* : \((.*)\) ->", text)
    assert len(operands) == 2
    assert all(types.count("xbf16") == 2 for types in operands), operands
