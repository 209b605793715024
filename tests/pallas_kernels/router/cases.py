"""Random inputs of route_tokens, and what it means for a route to be right."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.inputs import RouterCase, draw_router_case
from pallas_kernels.router import Route, reference_route_tokens

# Logits are of size 1. What float32 sums over H may be off, and then the weights.
LOGITS_BOUND = 1e-5
WEIGHTS_BOUND = 1e-5

_reference = jax.jit(reference_route_tokens, static_argnames=("K", "norm_topk_prob"))


class Size(NamedTuple):
    T: int
    E: int
    K: int
    H: int

    def __str__(self):
        return "-".join(f"{letter}{size}" for letter, size in self._asdict().items())


Case = RouterCase


def make_case(size: Size, seed: int) -> Case:
    """As draw_router_case, which the experiments share."""
    return draw_router_case(size.T, size.E, size.H, seed)


def assert_right(
    route: Route, case: Case, K: int, *, norm_eps: float | None = None, norm_topk_prob=True
) -> None:
    """The route is the reference's, but for float32 rounding where two logits nearly tie.

    Args:
      route: what route_tokens found.
      case: its inputs.
      K: experts a token.
      norm_eps: of the norm that comes first; None for no norm.
      norm_topk_prob: as in route_tokens.
    """
    T, E = len(case.x), len(case.gate)
    x = case.x
    if norm_eps is None:
        assert route.normed is None
    else:
        expected = reference_route_tokens(
            x, case.gate, K=K, norm_weight=case.norm_weight, norm_eps=norm_eps
        ).normed
        chex.assert_type(route.normed, jnp.bfloat16)
        # The squares' order may move a value over the edge between two bfloat16, and the product
        # with the weight over another: 2**-7 of the value each.
        found, expected = (np.asarray(a, np.float32) for a in (route.normed, expected))
        off = np.abs(found - expected)
        assert np.all(off <= 2**-6 * np.abs(expected))
        assert np.mean(off > 0) < 0.01
        x = route.normed
    for name, shape, dtype in (
        ("ids", (T, K), jnp.int32),
        ("weights", (T, K), jnp.float32),
        ("logits", (T, E), jnp.float32),
    ):
        chex.assert_shape(getattr(route, name), shape)
        chex.assert_type(getattr(route, name), dtype)
    reference = _reference(x, case.gate, K=K, norm_topk_prob=norm_topk_prob)
    ids, weights, logits = (np.asarray(a) for a in (route.ids, route.weights, route.logits))
    chex.assert_trees_all_close(logits, np.asarray(reference.logits), rtol=0, atol=LOGITS_BOUND)
    # Exactly the choice that these very logits ask for, ties included.
    chex.assert_trees_all_equal(ids, best_experts(logits, K))
    assert_same_experts(ids, np.asarray(reference.ids), x, case.gate)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = np.take_along_axis(exponentials, ids, axis=1)
    counted = expected if norm_topk_prob else exponentials
    expected /= counted.sum(axis=1, keepdims=True)
    chex.assert_trees_all_close(weights, expected, rtol=WEIGHTS_BOUND, atol=1e-30)


def best_experts(logits: np.ndarray, K: int) -> np.ndarray:
    """[T, K] int32: the K largest logits of each token; of equal ones the lower index first."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :K].astype(np.int32)


def assert_same_experts(found, expected, x, gate) -> None:
    """The same set for each token, or another one that is as good in float64."""
    exact = np.asarray(x, np.float64) @ np.asarray(gate, np.float64).T
    for token, (these, those) in enumerate(zip(found, expected, strict=True)):
        if set(these.tolist()) != set(those.tolist()):
            least = [exact[token, list(ids)].min() for ids in (these, those)]
            chex.assert_trees_all_close(least[0], least[1], rtol=0, atol=LOGITS_BOUND)
