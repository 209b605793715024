"""The kernel's oracle against float64 loops, and against the model's own router."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.layers import rms_norm
from moe_jax.routing import route, router_logits
from pallas_kernels.router import reference_route_tokens
from tests.pallas_kernels.router.cases import Size, make_case

SIZE = Size(T=5, E=12, K=3, H=20)


def test_matches_a_float64_loop(seed):
    case = make_case(SIZE, seed)
    found = reference_route_tokens(case.x, case.gate, K=SIZE.K)
    x, gate = np.asarray(case.x, np.float64), np.asarray(case.gate, np.float64)
    for t in range(SIZE.T):
        logits = gate @ x[t]
        probabilities = np.exp(logits) / np.exp(logits).sum()
        ids = sorted(range(SIZE.E), key=lambda e: (-logits[e], e))[: SIZE.K]
        weights = probabilities[ids] / probabilities[ids].sum()
        chex.assert_trees_all_close(found.logits[t], logits.astype(np.float32), atol=1e-5)
        chex.assert_trees_all_equal(found.ids[t], np.asarray(ids, np.int32))
        chex.assert_trees_all_close(found.weights[t], weights.astype(np.float32), rtol=1e-5)


def test_matches_the_model(seed):
    case = make_case(SIZE, seed)
    for norm_topk_prob in (True, False):
        found = reference_route_tokens(
            case.x,
            case.gate,
            K=SIZE.K,
            norm_topk_prob=norm_topk_prob,
            norm_weight=case.norm_weight,
            norm_eps=1e-5,
        )
        normed = rms_norm(case.x, case.norm_weight, 1e-5)
        logits = router_logits(normed, case.gate)
        expected = route(logits, SIZE.K, norm_topk_prob=norm_topk_prob)
        chex.assert_trees_all_equal(found.normed, normed)
        chex.assert_trees_all_close(found.logits, logits, atol=1e-5)
        chex.assert_trees_all_equal(found.ids, expected.ids)
        chex.assert_trees_all_close(found.weights, expected.weights, rtol=1e-5)


def test_has_gradients(seed):
    # reference_route_tokens is what the kernel's error sends a caller to for gradients.
    case = make_case(SIZE, seed)

    def loss(x):
        found = reference_route_tokens(x, case.gate.astype(jnp.float32), K=SIZE.K)
        return jnp.sum(found.weights[:, 0])

    chex.assert_tree_all_finite(jax.jit(jax.grad(loss))(case.x.astype(jnp.float32)))
