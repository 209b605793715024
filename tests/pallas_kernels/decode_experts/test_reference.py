"""reference_experts, every layout's oracle, against float64 loops that share no code with it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_scaled_fp8 import (
    VALUES_DTYPE,
    BlockScaledFp8,
    dequantise,
    scales_shape,
)
from pallas_kernels.decode_experts import ExpertWeights, reference_experts
from tests.pallas_kernels.decode_experts.cases import Case, Size, make_case

SIZE = Size(T=5, E=4, K=3, H=20, I=12)


def experts_by_loop(case: Case) -> np.ndarray:
    x, gate_up, down, ids, expert_weights = (
        np.asarray(array, np.float64)
        for array in (
            case.x,
            case.weights.gate_up,
            case.weights.down,
            case.expert_ids,
            case.expert_weights,
        )
    )
    out = np.zeros_like(x)
    for t in range(len(x)):
        for k in range(ids.shape[1]):
            e = int(ids[t, k])
            if 0 <= e < len(down):
                gate, up = gate_up[e, 0] @ x[t], gate_up[e, 1] @ x[t]
                out[t] += expert_weights[t, k] * (down[e] @ (gate / (1 + np.exp(-gate)) * up))
    return out


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("ids", ["distinct", "repeated", "padded"])
def test_matches_a_float64_loop(dtype, ids, seed):
    case = make_case(SIZE, seed)
    case = case._replace(
        x=case.x.astype(dtype), weights=jax.tree.map(lambda w: w.astype(dtype), case.weights)
    )
    if ids == "repeated":
        case = case._replace(expert_ids=case.expert_ids.at[:, 1].set(case.expert_ids[:, 0]))
    if ids == "padded":
        padded = case.expert_ids.at[0].set(-1).at[1, 0].set(SIZE.E).at[2, 1].set(-7)
        case = case._replace(expert_ids=padded)
    out = reference_experts(*case)
    chex.assert_shape(out, (SIZE.T, SIZE.H))
    chex.assert_type(out, jnp.float32)
    chex.assert_trees_all_close(out, experts_by_loop(case).astype(np.float32), rtol=2e-5, atol=1e-6)


def test_padding_is_selected_away(seed):
    case = make_case(SIZE, seed)
    case = case._replace(expert_ids=case.expert_ids.at[0].set(-1).at[1, 0].set(SIZE.E))
    clean = reference_experts(*case)
    dirty = case._replace(
        x=case.x.at[0].set(jnp.nan),
        expert_weights=case.expert_weights.at[0].set(jnp.nan).at[1, 0].set(jnp.inf),
    )
    out = reference_experts(*dirty)
    chex.assert_trees_all_equal(out, clean)
    chex.assert_trees_all_equal(out[0], jnp.zeros(SIZE.H))


def test_unused_expert_is_not_read(seed):
    case = make_case(SIZE, seed)
    case = case._replace(expert_ids=jnp.where(case.expert_ids == 0, -1, case.expert_ids))
    weights = ExpertWeights(
        gate_up=case.weights.gate_up.at[0].set(jnp.inf), down=case.weights.down.at[0].set(jnp.nan)
    )
    out = reference_experts(*case._replace(weights=weights))
    chex.assert_trees_all_equal(out, reference_experts(*case))


def test_has_gradients(seed):
    # reference_experts is what the layouts' errors send a caller to for gradients.
    case = make_case(SIZE, seed)
    x, weights = (
        case.x.astype(jnp.float32),
        jax.tree.map(lambda w: w.astype(jnp.float32), case.weights),
    )

    def loss(x, weights, expert_weights):
        # The checker hands over numpy arrays, which a tracer cannot index.
        weights = jax.tree.map(jnp.asarray, weights)
        return jnp.sum(reference_experts(x, weights, case.expert_ids, expert_weights) ** 2)

    arguments = (x, weights, case.expert_weights)
    chex.assert_numerical_grads(loss, arguments, order=1, atol=1e-2, rtol=1e-2)


def test_fp8_weights_are_their_dequantised_ones(seed):
    case = make_case(SIZE, seed)

    def in_fp8(weight):
        scales = np.random.default_rng(seed).uniform(0.5, 2, scales_shape(weight.shape))
        return BlockScaledFp8(
            values=weight.astype(VALUES_DTYPE), scales=jnp.asarray(scales, jnp.float32)
        )

    weights = ExpertWeights(gate_up=in_fp8(case.weights.gate_up), down=in_fp8(case.weights.down))
    plain = ExpertWeights(gate_up=dequantise(weights.gate_up), down=dequantise(weights.down))
    out = reference_experts(*case._replace(weights=weights))
    chex.assert_trees_all_close(out, reference_experts(*case._replace(weights=plain)), rtol=1e-6)
