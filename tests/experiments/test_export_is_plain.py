"""What is exported is plain, whatever the config, and is what the model computes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from experiments.ascend import artifact, folder, step
from experiments.ascend.census import Composite, violations, without_source_lines
from moe_jax import platform_ops
from moe_jax.cache import KVCache
from moe_jax.parameters import from_arrays
from moe_jax.presets import PRESETS
from moe_jax.quantization import fp8_config
from moe_jax.superkernel import VERSION

SIZES = {"B": 2, "S": 8, "capacity": 32}


def with_scope(preset: str, scope: str):
    config = PRESETS[preset]
    if scope == "off":
        return config
    return dataclasses.replace(config, enable_superkernel=True, superkernel_scope=scope)


LABELS = {"moe": "moe_experts", "attention": "attention", "model": "decode_layers"}


@pytest.mark.parametrize("scope", ["off", *LABELS])
@pytest.mark.parametrize("preset", ["tiny", "qwen3_30b_a3b"])
def test_the_decode_step_is_plain(preset, scope):
    """Abstract weights, so nothing is allocated."""
    config = with_scope(preset, scope)
    if scope != "model":  # which alone sees how many layers there are
        config = dataclasses.replace(config, num_hidden_layers=2)
    made = artifact.export(config, "decode", dtype=jnp.dtype("bfloat16"), **SIZES)
    assert made.exported.platforms == ("ascend",)
    assert violations(made.found) == []
    ops = made.found.ops
    assert ops["stablehlo.dot_general"] > 0
    # Spelt out beside the allow-list, so that a slip in that list does not pass here.
    banned = r"custom_call|sort|scatter|while|dynamic|top_k|reduce_window|case|\.if$|rng|pallas"
    assert [name for name in ops if re.search(banned, name)] == []
    times = {"off": 0, "model": 1}.get(scope, config.num_hidden_layers)
    expected = Composite(
        name=f"superkernel.{LABELS.get(scope)}",
        version=VERSION,
        attributes={"stream_fusion": False},
    )
    assert made.found.composites == (expected,) * times


@pytest.mark.parametrize("scope", ["off", "moe"])
def test_the_prefill_is_plain_and_has_no_scope(scope):
    config = with_scope("tiny", scope)
    made = artifact.export(config, "prefill", dtype=jnp.dtype("float32"), **SIZES)
    assert violations(made.found) == []
    assert made.found.composites == ()


def test_what_is_not_plain_is_refused(monkeypatch, tmp_path):
    """XLA's own forms, which may not ship: the message says what and where."""
    monkeypatch.setattr(platform_ops, "PORTABLE", platform_ops.XLA)
    config = dataclasses.replace(PRESETS["tiny"], rms_norm_eps=1e-4)  # of its own, for jit's cache
    with pytest.raises(folder.ArtifactError) as caught:
        artifact.export(config, "decode", dtype=jnp.dtype("float32"), **SIZES)
    message = str(caught.value)
    assert message.startswith("decode is not plain enough for ascend:\n")
    for part in ("chlo.top_k", "stablehlo.scatter", "reduce has 2 operands", "platform_ops.py:"):
        assert part in message


def test_the_environment_does_not_choose_what_is_exported(monkeypatch):
    def ops(eps):  # a config of its own each time, for jit's cache
        config = dataclasses.replace(PRESETS["tiny"], rms_norm_eps=eps)
        return artifact.export(config, "decode", dtype=jnp.dtype("float32"), **SIZES).found.ops

    expected = ops(2e-4)
    monkeypatch.setenv("MOE_JAX_EXPERTS_BACKEND", "reference")
    monkeypatch.setenv("MOE_JAX_PLATFORM", "cpu")
    assert ops(3e-4) == expected


@pytest.mark.parametrize("scope", ["off", *LABELS])
def test_the_override_on_a_cpu_runs_what_is_exported(monkeypatch, scope):
    """A model that is only called, with the platform named in the environment, on this CPU."""
    config = with_scope("tiny", scope)
    arguments = step.abstract_arguments(config, "decode", dtype=jnp.dtype("bfloat16"), **SIZES)

    def called(params, input_ids, cache):
        output = from_arrays(config, params)(
            input_ids, cache=KVCache(**cache), logits_to_keep=1, output_router_logits=False
        )
        logits = output.logits[:, 0]
        return {
            "cache": {name: getattr(output.cache, name) for name in cache},
            "logits": logits,
            "next_ids": platform_ops.PORTABLE.argmax(logits),
        }

    monkeypatch.setenv("MOE_JAX_PLATFORM", "NPU")
    on_cpu = jax.export.export(jax.jit(called, keep_unused=True), platforms=["cpu"])
    here = on_cpu(*arguments.values()).mlir_module()
    shipped = artifact.export(config, "decode", dtype=jnp.dtype("bfloat16"), **SIZES).stablehlo

    def operations(text):  # in order; names and the places of constants may differ
        lines = without_source_lines(text).splitlines()
        lines = [re.sub(r"%[\w:#]+", "%", line.strip()) for line in lines if " = " in line]
        return [re.sub(r"@[\w.]+", "@", line) for line in lines if "stablehlo.constant" not in line]

    assert operations(here)[1:] == operations(shipped)[1:]  # the first is the module itself
    assert len(operations(here)) > 200


@pytest.mark.parametrize("phase", step.PHASES)
def test_latent_and_shared_experts_dense_layers_fp8_and_a_window_are_plain(phase):
    config = dataclasses.replace(
        with_scope("tiny", "model"),
        moe_latent_size=32,
        moe_shared_expert_intermediate_size=48,
        use_sliding_window=True,
        sliding_window=6,
        num_hidden_layers=3,
        mlp_only_layers=(1,),
        quantization_config=fp8_config((0, 2), (24, 40)),
    )
    for rows in (1, 4):  # fewer assignments than experts, and as many
        made = artifact.export(config, phase, dtype=jnp.dtype("bfloat16"), **SIZES | {"B": rows})
        assert violations(made.found) == []
