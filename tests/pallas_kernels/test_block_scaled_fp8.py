"""The quantised weight format: what a weight means, and what is wrong with one."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.block_scaled_fp8 import (
    BlockScaledFp8,
    check_block_scaled_fp8,
    dequantise,
    quantise,
    scales_shape,
)
from tests.moe_jax.scaled_weights import quantised


def draw(shape, block, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, shape).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.5, 2, scales_shape(shape, block)).astype(np.float32)
    return BlockScaledFp8(values=jnp.asarray(values), scales=jnp.asarray(scales), block=block)


@pytest.mark.parametrize(("shape", "block"), [((7, 9), (4, 5)), ((2, 3, 130, 200), (128, 128))])
def test_each_value_times_its_blocks_scale(shape, block):
    weight = draw(shape, block)
    values, scales = np.asarray(weight.values, np.float32), np.asarray(weight.scales)
    expected = np.empty(shape, np.float32)
    for index in np.ndindex(shape):
        *stack, row, column = index
        expected[index] = values[index] * scales[(*stack, row // block[0], column // block[1])]
    np.testing.assert_array_equal(dequantise(weight), expected)
    np.testing.assert_array_equal(
        dequantise(weight, jnp.bfloat16).astype(np.float32),
        expected.astype(ml_dtypes.bfloat16).astype(np.float32),
    )


def test_a_plain_weight_is_cast():
    weight = jnp.asarray([[1.5, -2.0]], jnp.bfloat16)
    assert dequantise(weight).dtype == jnp.float32
    np.testing.assert_array_equal(dequantise(weight), [[1.5, -2.0]])


def test_quantise_rounds_as_ml_dtypes_does():
    """Numbers of every size, ties and zeros; ragged blocks, and one of nothing but zeros."""
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(2, 20, 33)) * 2.0 ** rng.integers(-14, 4, (2, 20, 33))
    e4m3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = np.append((e4m3[1:] + e4m3[:-1]) / 2, 448)
    weight[0, :8, :16].flat = ties  # one block, of scale 1
    weight[1, 8:16, 16:32] = 0
    found, expected = (
        jax.jit(quantise, static_argnums=1)(weight, (8, 16)),
        quantised(weight, (8, 16)),
    )
    assert found.scales[0, 0, 0] == found.scales[1, 1, 1] == 1
    np.testing.assert_array_equal(found.scales, expected.scales)
    np.testing.assert_array_equal(found.values.view(np.uint8), expected.values.view(np.uint8))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"values": jnp.zeros((7, 9))}, TypeError, r"w\.values has dtype float32"),
        ({"scales": jnp.ones((2, 2), jnp.bfloat16)}, TypeError, r"w\.scales has dtype bfloat16"),
        ({"scales": jnp.ones((2, 3))}, ValueError, r"w\.scales has shape \(2, 3\); .*\(2, 2\)"),
    ],
)
def test_what_is_wrong_is_named(change, error, says):
    weight = draw((7, 9), (4, 5))
    check_block_scaled_fp8("w", weight)
    with pytest.raises(error, match=says):
        check_block_scaled_fp8("w", dataclasses.replace(weight, **change))
