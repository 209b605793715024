"""The baselines compute the layer; what cannot run is left out; inputs keep a chain's size."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import accuracy, baselines, candidates, inputs
from experiments.bench.baselines import XLA_BASELINES
from experiments.bench.inputs import Case
from experiments.bench.routings import make_routings
from pallas_kernels.decode_experts import ExpertShapes

SHAPES = ExpertShapes(E=6, K=3, H=256, I=64)
T = 5


@pytest.fixture(scope="module")
def weights():
    return inputs.draw_weights(jax.random.key(0), SHAPES)


@pytest.fixture(scope="module")
def cases(weights):
    """A case of each routing."""
    return {
        routing: Case(
            inputs.draw_tokens(1, T, SHAPES.H),
            weights,
            *map(jnp.asarray, make_routings(routing, SHAPES, T, 1, 0)[0]),
        )
        for routing in ("uniform", "one_expert")
    }


@pytest.mark.parametrize("name", XLA_BASELINES)
def test_baseline_against_the_reference(cases, name):
    layer = jax.jit(functools.partial(XLA_BASELINES[name], out_dtype=jnp.float32))
    low, high = (2.5e-3, 6e-3) if name == "bf16_rounding" else (1e-4, 2.5e-3)
    for case in cases.values():
        found = accuracy.measure_errors(layer, [case], [np.asarray(inputs.jitted_reference(*case))])
        chex.assert_scalar_in(found.relative, low, high)
    bf16 = functools.partial(XLA_BASELINES[name], out_dtype=jnp.bfloat16)
    y = jax.eval_shape(bf16, *cases["uniform"])
    assert (y.shape, y.dtype) == ((T, SHAPES.H), jnp.bfloat16)


def test_dense_drops_experts_that_were_not_routed(cases):
    ids = jnp.arange(3 * T).reshape(T, 3) % 5
    case = cases["uniform"]._replace(expert_ids=ids)
    poisoned = jax.tree.map(lambda leaf: leaf.at[5].set(jnp.inf), case.weights)
    chex.assert_tree_all_finite(
        jax.jit(XLA_BASELINES["xla_dense"])(*case._replace(weights=poisoned))
    )


def test_a_chain_of_drawn_inputs_keeps_its_size(weights):
    drawn = inputs.draw_inputs(
        SHAPES, [weights], 4, routing="uniform", seed=0, num_steps=3, num_cases=2
    )
    assert len(drawn.steps) == 3 and len(drawn.cases) == len(drawn.references) == 2
    layer, y = jax.jit(XLA_BASELINES["xla_gather"]), drawn.x
    for step in drawn.steps:
        y = layer(y, *step)
        size = jnp.sqrt(jnp.mean(y.astype(jnp.float32) ** 2, axis=1))
        chex.assert_trees_all_close(size, jnp.ones(4), rtol=0.05)
    # One layer's expert comes up again at once: L2 is warm.
    assert not drawn.is_cold
    for case, reference in zip(drawn.cases, drawn.references, strict=True):
        assert case.x.shape == reference.shape == (4, SHAPES.H)
        assert not np.array_equal(case.x, drawn.x)


def test_a_shard_gets_cases_for_all_shards_and_padding(weights):
    drawn = inputs.draw_inputs(
        SHAPES, [weights], 4, routing="uniform", seed=0, num_steps=1, num_cases=1, all_experts=24
    )
    assert len(drawn.cases) == 4
    ids = np.stack([case.expert_ids for case in drawn.cases])
    assert -1 in ids and ids.max() < SHAPES.E
    assert drawn.traffic.unique_experts < SHAPES.E


def test_specs_are_what_is_drawn():
    drawn = inputs.draw_case(SHAPES, T, 0)
    specs = inputs.case_specs(SHAPES, T)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), drawn) == jax.tree.map(
        lambda a: (a.shape, a.dtype), specs
    )


def test_what_does_not_fit_is_fewer_layers():
    layer_bytes = 6 * 3 * 256 * 64 * 2
    assert inputs.num_layers(SHAPES, None) == 4
    assert inputs.num_layers(SHAPES, 100 * layer_bytes) == 4
    assert inputs.num_layers(SHAPES, 4 * layer_bytes) == 2
    assert inputs.num_layers(SHAPES, layer_bytes) == 1


def test_what_cannot_run_here_is_left_out(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found, left_out = candidates.make_baselines(["xla_gather", "tokamax", "vllm"], jnp.bfloat16)
    assert [candidate.name for candidate in found] == ["xla_gather"]
    assert [line.split(":")[1].strip() for line in left_out] == [
        "tokamax is not installed",
        "vllm is not installed",
    ]


def test_ragged_product_made_dense_is_seen():
    text = "%f = bf16[16,128,2048]{2,1,0} fusion(%a), kind=kLoop"
    shapes = ExpertShapes(E=128, K=8, H=2048, I=768)
    assert baselines.is_dense_expansion(text, 2, shapes)
    assert baselines.is_dense_expansion(text.replace("[16,128,", "[128,16,"), 2, shapes)
    assert not baselines.is_dense_expansion(text, 4, shapes)
