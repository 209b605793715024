"""The baselines compute the layer, and the emulation rounds as often as it says."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.compare import accuracy, candidates, layers
from experiments.compare.baselines import XLA_BASELINES, xla_gather
from experiments.compare.routings import Routing, make_routings
from pallas_kernels.decode_experts import ExpertShapes, reference_experts

SHAPES = ExpertShapes(E=6, K=3, H=256, I=64)


@pytest.fixture(scope="module")
def layer():
    return layers.make_layer(jax.random.key(0), SHAPES)


def _errors(function, layer, routing, T=5):
    x = layers.make_tokens(1, T, SHAPES.H)
    (routed,) = make_routings(routing, SHAPES, T, 1, 0)
    reference = np.asarray(reference_experts(x, layer, *routed))
    return accuracy.measure(jax.jit(function), layer, [x], [routed], [reference])


@pytest.mark.parametrize("routing", ["uniform", "one_expert"])
@pytest.mark.parametrize("name", XLA_BASELINES)
def test_baseline_against_the_reference(layer, name, routing):
    function = functools.partial(XLA_BASELINES[name], out_dtype=jnp.float32)
    low, high = (2.5e-3, 6e-3) if name == "bf16_rounding" else (1e-4, 2.5e-3)
    chex.assert_scalar_in(_errors(function, layer, routing).relative, low, high)


@pytest.mark.parametrize("name", XLA_BASELINES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_output_dtype(layer, name, dtype):
    (routed,) = make_routings("uniform", SHAPES, 2, 1, 0)
    x = layers.make_tokens(1, 2, SHAPES.H)
    y = jax.eval_shape(functools.partial(XLA_BASELINES[name], out_dtype=dtype), x, layer, *routed)
    chex.assert_shape(y, (2, SHAPES.H))
    assert y.dtype == dtype


def test_dense_drops_experts_that_were_not_routed(layer):
    ids = np.array([[0, 1, 2]], np.int32)
    poisoned = jax.tree.map(lambda leaf: leaf.at[5].set(jnp.inf), layer)
    x = layers.make_tokens(1, 1, SHAPES.H)
    y = XLA_BASELINES["xla_dense"](x, poisoned, ids, np.ones((1, 3), np.float32))
    chex.assert_tree_all_finite(y)


def test_calibrated_chain_keeps_its_size(layer):
    x = layers.make_tokens(1, 4, SHAPES.H)
    routings = layers.calibrate(x, [layer], make_routings("uniform", SHAPES, 4, 3, 0))
    y = x
    for ids, weights in routings:
        y = xla_gather(y, layer, ids, weights)
        size = jnp.sqrt(jnp.mean(y.astype(jnp.float32) ** 2, axis=1))
        chex.assert_trees_all_close(size, jnp.ones(4), rtol=0.05)


def test_errors_are_over_all_routings_together(layer):
    x = jnp.ones((1, 2))
    references = [np.array([[3.0, 4.0]]), np.array([[0.0, 12.0]])]
    routing = Routing(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32))
    found = accuracy.measure(
        lambda *_: jnp.array([[3.0, 8.0]]), layer, [x, x], [routing] * 2, references
    )
    # The differences are (0, 4) and (3, -4), the references (3, 4) and (0, 12).
    assert found.relative == pytest.approx((41 / 169) ** 0.5)
    assert found.largest == 4.0
    assert found.rounding == 0.0


def _errors_of(relative, rounding=1.66e-3):
    return accuracy.Errors(relative=relative, largest=0.0, rounding=rounding)


def test_layout_above_its_bound_is_named():
    check = functools.partial(accuracy.check_layout, "output_major", dtype="bfloat16")
    check(_errors_of(1.7e-3), 1e-6)
    check(_errors_of(1.9e-3, rounding=1.89e-3), 1e-6)  # few outputs: bf16 itself is that far off
    with pytest.raises(AssertionError, match=r"output_major: relative error 2.00e-03 of the bf"):
        check(_errors_of(2e-3), 1e-6)
    with pytest.raises(AssertionError, match=r"of the float32 output is above 1.0e-04"):
        check(_errors_of(1.7e-3), 2e-4)
    with pytest.raises(AssertionError, match="nan"):
        check(_errors_of(float("nan")), None)


def test_what_cannot_run_here_is_left_out(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found, left_out = candidates.make_baselines(["xla_gather", "tokamax", "vllm"], jnp.bfloat16)
    assert [candidate.name for candidate in found] == ["xla_gather"]
    assert [line.split(":")[1].strip() for line in left_out] == [
        "tokamax is not installed",
        "vllm is not installed",
    ]
