"""Experts in FP8: each backend computes what it computes of the dequantised weights, or refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.experts import ExpertWeights, SharedExperts, experts
from pallas_kernels.block_scaled_fp8 import BlockScaledFp8
from tests.moe_jax.scaled_weights import dequantised, quantised
from tests.moe_jax.test_experts import H, I, make

BLOCK = (48, 40)  # cuts off both edges of every weight


def scaled_and_plain(tree, dtype):
    """Every matrix of a tree in FP8, and dequantised to `dtype`."""
    scaled = jax.tree.map(lambda weight: quantised(weight, BLOCK), tree)
    is_scaled = {"is_leaf": lambda node: isinstance(node, BlockScaledFp8)}
    return scaled, jax.tree.map(lambda weight: dequantised(weight, dtype), scaled, **is_scaled)


def projections(L=24, N=56):
    """What stands around experts that are L wide."""
    rng = np.random.default_rng(1)
    draw = lambda rows, columns: rng.normal(size=(rows, columns)) * columns**-0.5  # noqa: E731
    return {
        "fc1_latent_proj": draw(L, H),
        "fc2_latent_proj": draw(H, L),
        "shared_experts": SharedExperts(draw(N, H), draw(N, H), draw(H, N)),
    }


@pytest.mark.parametrize(
    ("T", "dtype", "around"),
    [(2, jnp.float32, projections()), (4, jnp.bfloat16, {})],
    ids=["gathered", "all multiplied"],
)
def test_portable_computes_the_dequantised_weights(T, dtype, around):
    x, weights, ids, w = make(dtype, T=T)
    ids = ids.at[1, 0].set(-1)
    if around:
        L = around["fc1_latent_proj"].shape[0]
        weights = ExpertWeights(gate_up=weights.gate_up[..., :L], down=weights.down[:, :L])

    @jax.jit
    def run(pair):
        return [experts(x, own, ids, w, backend="portable", **more) for own, more in pair]

    found, expected = run(scaled_and_plain((weights, around), dtype))
    np.testing.assert_allclose(*np.asarray([found, expected], np.float32), rtol=1e-6, atol=1e-6)
    assert np.abs(np.asarray(found, np.float32)).max() > 0.1


def test_a_backend_without_them_says_who_has_them_or_is_told_to_dequantise():
    x, weights, ids, w = make(jnp.float32)
    scaled, plain = scaled_and_plain(weights, np.float32)
    with pytest.raises(
        NotImplementedError, match=r"'grouped' does not do quantised weights; reference, portable"
    ):
        experts(x, scaled, ids, w, backend="grouped")

    @jax.jit
    def run(scaled, plain):
        return [
            experts(x, each, ids, w, backend="grouped", dequantize=True) for each in (scaled, plain)
        ]

    np.testing.assert_array_equal(*run(scaled, plain))


def test_what_is_wrong_with_scaled_weights_is_named():
    x, weights, ids, w = make(jnp.float32, T=2)
    scaled, plain = scaled_and_plain(weights, np.float32)
    cases = {
        r"weights\.down is float32; expected BlockScaledFp8": {"down": plain.down},
        r"weights\.gate_up\.scales has shape": {
            "gate_up": dataclasses.replace(scaled.gate_up, block=(I, H))
        },
    }
    for message, change in cases.items():
        with pytest.raises((TypeError, ValueError), match=message):
            experts(x, dataclasses.replace(scaled, **change), ids, w)


def test_other_blocks_are_not_the_kernels():
    def whole(block, I=256):
        shapes = ((2, 2, I, 128), (2, 128, I))
        gate_up, down = (quantised(np.ones(shape), block) for shape in shapes)
        return ExpertWeights(gate_up=gate_up, down=down).in_whole_blocks

    assert whole((128, 128))
    assert not whole((64, 128))
    assert not whole((128, 128), I=192)
