"""A model in FP8: which parameters are, what it computes, what it refuses, where its scales lie."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from moe_jax.model import Qwen3Moe
from moe_jax.parameters import from_arrays, parameter_count, parameter_shapes, to_arrays
from moe_jax.quantization import fp8_config, is_quantised, naming_plain
from moe_jax.sharding import scales_sharding
from tests.moe_jax.scaled_weights import dequantised, in_format_of, quantised
from tests.moe_jax.tiny import TINY, random_arrays

BLOCK = (24, 40)  # cuts off both edges of most weights
PLAIN = dataclasses.replace(
    TINY, mlp_only_layers=(0,), moe_latent_size=32, moe_shared_expert_intermediate_size=48
)
SCALED = dataclasses.replace(PLAIN, quantization_config=fp8_config((1,), BLOCK))


def scaled_and_dequantised(config) -> tuple[dict, dict]:
    """Arrays of a model in the config's format, and those of the plain model that it means."""
    plain = random_arrays(dataclasses.replace(config, quantization_config=None))
    scaled = in_format_of(config, plain)
    for name, array in plain.items():
        if f"{name}.values" in scaled:
            plain[name] = dequantised(quantised(array, BLOCK))
    return scaled, plain


def test_equals_the_model_of_the_dequantised_weights():
    scaled, plain = scaled_and_dequantised(SCALED)
    quantised_names = {name.removesuffix(".values") for name in scaled if name.endswith(".values")}
    assert quantised_names == {
        *(f"layers.{layer}.self_attn.{x}_proj.weight" for layer in (0, 1) for x in "qkvo"),
        *(f"layers.0.mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
        *(f"layers.1.mlp.fc{x}_latent_proj.weight" for x in (1, 2)),
        *(f"layers.1.mlp.shared_experts.{x}_proj.weight" for x in ("gate", "up", "down")),
        *(f"layers.1.mlp.experts.{x}" for x in ("gate_up", "down")),
    }
    ids = jnp.arange(6)[None]

    @jax.jit
    def run(scaled, plain):
        models = from_arrays(SCALED, scaled), from_arrays(PLAIN, plain)
        return [model(ids).logits for model in models]

    found, expected = run(scaled, plain)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_random_model_is_quantised_as_its_config_says():
    config = dataclasses.replace(
        TINY, num_hidden_layers=1, quantization_config=fp8_config((0,), BLOCK)
    )

    def make():
        model = Qwen3Moe(config, rngs=nnx.Rngs(0))
        return model, to_arrays(model)

    model, arrays = jax.eval_shape(make)
    assert arrays == parameter_shapes(config)
    assert jax.tree.structure(from_arrays(config, arrays)) == jax.tree.structure(model)
    assert parameter_count(config) == parameter_count(
        dataclasses.replace(config, quantization_config=None)
    )


def test_every_problem_is_listed():
    arrays, _ = scaled_and_dequantised(SCALED)
    down, q = "layers.1.mlp.experts.down", "layers.0.self_attn.q_proj.weight"
    del arrays[f"{down}.scales"]
    arrays[f"{q}.scales"] = np.ones((6, 3), np.float32)
    arrays[f"{q}.values"] = arrays[f"{q}.values"].view(np.uint8)
    arrays["norm.weight.scales"] = np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match="do not fit the config") as raised:
        from_arrays(SCALED, arrays)
    for line in (
        f"missing: {down}.scales",
        "unexpected: norm.weight.scales",
        f"{q}.scales has shape (6, 3); expected (6, 2)",
        f"{q}.values has dtype uint8; expected float8_e4m3fn",
    ):
        assert line in str(raised.value)


@pytest.mark.parametrize(
    ("patterns", "plain"),
    [
        (["lm_head"], set()),
        (["model.layers.1"], {"q", "gate_up", "down"}),
        (["model.layers.1.self_attn"], {"q"}),
        (["model.layers.1.mlp.gate", "model.layers.1.self_attn.q"], set()),
        (["q_proj"], {"q"}),
        (["model.layers.*.mlp.experts"], {"gate_up", "down"}),
        ([r"model\.layers\.\d+\.mlp\.experts\.\d+\.down_proj"], {"down"}),
    ],
)
def test_modules_that_are_not_converted(patterns, plain):
    names = {
        "q": "layers.1.self_attn.q_proj.weight",
        "gate_up": "layers.1.mlp.experts.gate_up",
        "down": "layers.1.mlp.experts.down",
    }
    for field in ("modules_to_not_convert", "ignored_layers"):
        config = {"quant_method": "fp8", field: patterns}
        assert {key for key, name in names.items() if not is_quantised(name, config)} == plain
    completed = naming_plain(config, names.values(), (1,))
    assert not any(is_quantised(name, completed) for name in names.values())
    for never in ("layers.1.mlp.gate.weight", "lm_head.weight", "embed_tokens.weight"):
        assert not is_quantised(never, {"quant_method": "fp8"})


def test_patterns_that_are_no_regexes():
    for patterns in ("lm_head", ["("], [3]):
        with pytest.raises(NotImplementedError, match=r"modules_to_not_convert is .*list of"):
            is_quantised(
                "layers.0.self_attn.q_proj.weight",
                {"quant_method": "fp8", "modules_to_not_convert": patterns},
            )


@pytest.mark.parametrize(("platform", "ties"), [("cuda", 2), ("cpu", 2), ("ascend", 0)])
def test_each_layer_is_tied_to_its_input(platform, ties):
    """Or XLA would dequantise all layers first; Ascend gets plain operations only."""

    def call(arrays, ids):
        return from_arrays(SCALED, arrays)(ids, platform=platform).logits

    ids = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    jaxpr = jax.make_jaxpr(call)(parameter_shapes(SCALED), ids)
    assert str(jaxpr).count("optimization_barrier") == ties


def test_scales_lie_where_their_values_do():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "expert"))
    for spec, shape, expected in (
        (("expert",), (8, 2, 6, 16), ("expert",)),
        (("expert", "data"), (6, 16), (None, "data")),  # [768, 2048] in blocks of 128
        ((("data", "expert"), None), (16, 6), (("data", "expert"), None)),
        ((None, ("data", "expert")), (16, 6), (None, None)),
    ):
        values = NamedSharding(mesh, PartitionSpec(*spec))
        assert scales_sharding(values, shape).spec == PartitionSpec(*expected)
    one = SingleDeviceSharding(jax.devices()[0])
    assert scales_sharding(one, (6, 16)) is one
