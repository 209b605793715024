"""Parameter names, counts of the published models, and models made from arrays."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moe_jax.model import Qwen3Moe
from moe_jax.parameters import (
    active_parameter_count,
    from_arrays,
    parameter_count,
    parameter_shapes,
    to_arrays,
)
from moe_jax.presets import PRESETS
from tests.moe_jax.tiny import TINY, random_arrays


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("qwen3_30b_a3b", 30.532, 3.353),
        ("qwen3_30b_a3b_instruct_2507", 30.532, 3.353),
        ("qwen3_coder_30b_a3b", 30.532, 3.353),
        ("qwen3_235b_a22b", 235.094, 22.191),
        ("qwen3_coder_480b_a35b", 480.155, 35.475),
    ],
)
def test_published_sizes(name, total, active):
    assert round(parameter_count(PRESETS[name]) / 1e9, 3) == total
    assert round(active_parameter_count(PRESETS[name]) / 1e9, 3) == active


def test_names_and_shapes():
    config = dataclasses.replace(TINY, mlp_only_layers=(0,), attention_bias=True)
    shapes = {name: struct.shape for name, struct in parameter_shapes(config).items()}
    assert shapes["embed_tokens.weight"] == shapes["lm_head.weight"] == (512, 64)
    assert shapes["layers.0.mlp.gate_proj.weight"] == (128, 64)
    assert shapes["layers.0.self_attn.q_proj.bias"] == (128,)
    assert shapes["layers.1.self_attn.o_proj.weight"] == (64, 128)
    assert shapes["layers.1.mlp.gate.weight"] == (8, 64)
    assert shapes["layers.1.mlp.experts.gate_up"] == (8, 2, 64, 64)
    assert shapes["layers.1.mlp.experts.down"] == (8, 64, 64)
    assert "lm_head.weight" not in parameter_shapes(
        dataclasses.replace(config, tie_word_embeddings=True)
    )


def test_arrays_make_the_same_model():
    dtype, config = jnp.float16, dataclasses.replace(TINY, num_hidden_layers=1)  # no default
    model = Qwen3Moe(config, rngs=nnx.Rngs(0), dtype=dtype)
    arrays = to_arrays(model)
    assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == {
        name: (struct.shape, struct.dtype)
        for name, struct in parameter_shapes(config, dtype).items()
    }
    again = from_arrays(config, arrays)
    assert all(array is arrays[name] for name, array in to_arrays(again).items())
    assert jax.tree.structure(again) == jax.tree.structure(model)


def test_models_of_equal_configs_share_nothing():
    """Nor their configs: 1 and 1.0 are equal, and are written differently."""
    arrays = {name: jnp.zeros(s.shape) for name, s in parameter_shapes(TINY).items()}
    configs = [
        dataclasses.replace(TINY, rms_norm_eps=eps, extra={"bos_token_id": eps}) for eps in (1, 1.0)
    ]
    one, other = (from_arrays(config, arrays) for config in configs)
    assert (one.config, other.config) == tuple(configs)
    one.norm.weight[...] = jnp.ones(64)
    assert not to_arrays(other)["norm.weight"].any()
    assert {name: s.shape for name, s in parameter_shapes(TINY).items()} == {
        name: array.shape for name, array in arrays.items()
    }


def test_every_problem_is_listed():
    arrays = random_arrays(TINY)
    del arrays["norm.weight"]
    arrays["layers.1.mlp.gate.weight"] = jnp.ones((7, 64))
    arrays["rotary"] = jnp.ones(3)
    with pytest.raises(ValueError, match="do not fit the config") as raised:
        from_arrays(TINY, arrays)
    for part in ("missing: norm.weight", "unexpected: rotary", "(7, 64); expected (8, 64)"):
        assert part in str(raised.value)


def test_few_python_calls_find_the_parameters():
    """In nnx.state's order; its own walk made 250 calls for each, in each call of `generate`."""
    config = dataclasses.replace(TINY, num_hidden_layers=11)
    model = from_arrays(config, random_arrays(config))
    expected = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))]
    calls, before = [], sys.getprofile()
    sys.setprofile(lambda frame, event, _: calls.append(event) if "call" in event else None)
    try:
        found = to_arrays(model)
    finally:
        sys.setprofile(before)
    assert list(found) == expected
    assert len(calls) < 50 * len(expected)


class Doubled(nnx.Param):
    """A parameter that gives another value than it holds."""

    def get_value(self, **index):
        return 2 * super().get_value(**index)


def test_arrays_are_what_the_variables_give():
    model = from_arrays(TINY, random_arrays(TINY))
    model.norm.weight = Doubled(jnp.ones(64))
    model.embed_tokens.weight = nnx.Param(jnp.ones((512, 64)), ref=True)
    arrays = to_arrays(model)
    assert (arrays["norm.weight"] == 2).all()
    assert isinstance(arrays["embed_tokens.weight"], jax.Array)
    model.embed_tokens.weight[...] = jnp.zeros((512, 64))
    assert arrays["embed_tokens.weight"].all() and not to_arrays(model)["embed_tokens.weight"].any()
