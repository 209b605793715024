"""Qwen3MoeConfig: both spellings in and out, every wrong value named, nothing lost."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from moe_jax.config import ConfigError, Qwen3MoeConfig, read_config
from moe_jax.presets import PRESETS
from moe_jax.rope import KINDS, RopeConfig, rope_tables

each_preset = pytest.mark.parametrize("name", PRESETS)
each_spelling = pytest.mark.parametrize("spelling", ["v4", "v5"])

# Qwen3-Coder-30B-A3B's file, with the keys that no field reads.
CODER = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5472,
    "max_position_embeddings": 262144,
    "max_window_layers": 28,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "qkv_bias": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.0,
    "shared_expert_intermediate_size": 0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.3",
    "use_cache": True,
    "use_qk_norm": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}


@each_preset
@each_spelling
def test_presets_survive_json(name, spelling):
    config = PRESETS[name]
    text = json.dumps(config.to_hf(spelling))
    assert Qwen3MoeConfig.from_hf(json.loads(text)) == config
    assert hash(Qwen3MoeConfig.from_hf(json.loads(text))) == hash(config)


def test_a_hub_file_is_read_and_written_back_unchanged():
    config = Qwen3MoeConfig.from_hf(CODER)
    assert config.to_hf() == CODER
    assert config.extra["use_qk_norm"] is True
    assert dataclasses.replace(config, extra={}) == PRESETS["qwen3_coder_30b_a3b"]


def test_defaults_are_those_of_hugging_face():
    config = Qwen3MoeConfig.from_hf({"head_dim": None, "mlp_only_layers": None})
    assert (config.head_dim, config.norm_topk_prob, config.rope.theta) == (64, False, 10000.0)
    assert config == Qwen3MoeConfig()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", **YARN}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
        {"rope_parameters": {"type": "yarn", "rope_theta": 1e6, **YARN}, "rope_theta": 5.0},
        {"rope_parameters": {"rope_type": "linear"}, "rope_scaling": {"type": "yarn", **YARN}}
        | {"rope_theta": 1e6},
    ],
)
def test_each_spelling_of_rope_is_one_config(rope):
    expected = RopeConfig(
        theta=1e6, kind="yarn", factor=4.0, original_max_position_embeddings=32768
    )
    assert Qwen3MoeConfig.from_hf(rope).rope == expected


def test_an_original_length_beside_the_settings_wins():
    config = Qwen3MoeConfig.from_hf(
        {"rope_scaling": {"type": "yarn", **YARN}, "original_max_position_embeddings": 4096}
    )
    assert config.rope.original_max_position_embeddings == 4096


def test_num_local_experts_is_num_experts():
    assert Qwen3MoeConfig.from_hf({"num_local_experts": 16}).num_experts == 16
    with pytest.raises(ConfigError, match="num_experts is 8 and num_local_experts is 16"):
        Qwen3MoeConfig.from_hf({"num_local_experts": 16, "num_experts": 8})


def test_unknown_rope_settings_are_kept_with_a_warning():
    with pytest.warns(UserWarning, match="finetuned"):
        config = Qwen3MoeConfig.from_hf(
            {"rope_scaling": {"type": "yarn", "finetuned": True, **YARN}}
        )
    assert config.to_hf()["rope_scaling"]["finetuned"] is True


def test_which_layers_have_experts():
    config = dataclasses.replace(
        PRESETS["tiny"], num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=(3,)
    )
    assert config.moe_layers == (1, 5)
    assert dataclasses.replace(config, num_experts=0).moe_layers == ()


def test_the_window_counts_only_if_it_is_used():
    assert Qwen3MoeConfig(sliding_window=16).window is None
    assert Qwen3MoeConfig(sliding_window=16, use_sliding_window=True).window == 16


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("vocab_size", 0, "a positive integer"),
        ("hidden_size", 2048.0, "a positive integer"),
        ("num_hidden_layers", True, "a positive integer"),
        ("hidden_act", "mish", "silu"),
        ("rms_norm_eps", -1.0, "at least 0"),
        ("rms_norm_eps", float("nan"), "at least 0"),
        ("norm_topk_prob", 1, "True or False"),
        ("mlp_only_layers", [-1], "layer indices"),
        ("num_key_value_heads", 3, "divisor of num_attention_heads = 32"),
        ("head_dim", 7, "even number"),
        ("num_experts_per_tok", 200, "at most num_experts = 128"),
        ("mlp_only_layers", 3, "mlp_only_layers is 3; expected layer indices"),
        ("mlp_only_layers", "01", "mlp_only_layers is '01'; expected layer indices"),
        ("vocab_size", 2**31, "a positive integer below 2..31"),
        ("hidden_size", [10**5000], "hidden_size is a list too long to show; expected a positive"),
        ("rms_norm_eps", 10**400, "at least 0, in float32"),
        ("num_experts", [[0] * 999], r"\.\.\. .*; expected an integer from 0"),
        (
            "shared_expert_intermediate_size",
            512,
            "is 512; expected 0, because a shared expert behi",
        ),
        ("rope_theta", 0, "above 1"),
        ("rope_theta", 10**400, "rope_theta is 10000.*; expected a number above 1, in float32"),
        ("rope_theta", 1e39, "above 1, in float32"),
        ("rope_theta", "1e6", "above 1"),
        ("rope_scaling", {"type": "unheard"}, "'unheard'; expected one of"),
        ("rope_scaling", {"type": "yarn"}, "needs factor"),
        ("rope_scaling", {"type": "linear", "factor": -2.0}, "factor is -2.0"),
        ("rope_scaling", [1], "expected null or a mapping"),
        ("rope_scaling", {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, "64"),
        ("rope_scaling", {"type": "linear", "factor": 10**400}, "factor is 1000.*above 0, in flo"),
        ("rope_scaling", {"type": "linear", "factor": 1e-45}, "factor is 1e-45; .*above 0, in flo"),
        ("rope_scaling", {"type": "yarn", "mscale": "a", **YARN}, "mscale is 'a'; .*at least 0"),
        ("rope_scaling", {"type": "yarn", "truncate": 0, **YARN}, "truncate is 0; .*True or False"),
        ("rope_scaling", {"type": "yarn", "beta_fast": -(10**400), **YARN}, "beta_fast is -1"),
        ("rope_scaling", LONGROPE | {"short_factor": 2.0}, "short_factor is 2.0; expected a list"),
        ("rope_scaling", LONGROPE | {"long_factor": True}, "long_factor is True; expected a list"),
        ("rope_scaling", LONGROPE | {"long_factor": "ab"}, "long_factor is 'ab'; expected a list"),
        ("rope_scaling", LONGROPE | {"long_factor": [10**400]}, "long_factor is .*expected a list"),
        (
            "rope_scaling",
            LONGROPE | {"factor": 2.0, "original_max_position_embeddings": 1},
            "attention_factor comes to inf",
        ),
        ("partial_rotary_factor", 0.5, "expected 1"),
        ("router_dtype", "bfloat16", "'float32' or 'model'"),
        ("moe_chunk_max_len", 0, "positive integer"),
        ("moe_latent_size", 0, "None or a positive integer"),
        ("moe_shared_expert_intermediate_size", -1, "None or a positive integer"),
        ("enable_superkernel", "yes", "True or False"),
        ("superkernel_scope", "moe_experts", "one of .'moe', 'attention', 'model'."),
        ("quantization_config", "fp8", "a mapping"),
        ("model_type", "qwen2_moe", "expected 'qwen3_moe'"),
    ],
)
def test_a_wrong_value_is_named(field, value, accepted):
    data = {"head_dim": 128, field: value}
    with pytest.raises(ConfigError, match=accepted):
        Qwen3MoeConfig.from_hf(data)


def test_window_without_a_size():
    with pytest.raises(ConfigError, match="sliding_window is None"):
        Qwen3MoeConfig(use_sliding_window=True, sliding_window=None)


def test_head_dim_that_cannot_be_derived():
    with pytest.raises(ConfigError, match="head_dim is None and hidden_size = 100"):
        Qwen3MoeConfig(hidden_size=100)


def test_unknown_spelling():
    with pytest.raises(ConfigError, match="'v6'"):
        Qwen3MoeConfig().to_hf("v6")


@pytest.mark.parametrize("levels", [101, 100_000])
def test_nesting(levels):
    deep = []
    for _ in range(levels - 1):
        deep = [deep]
    for field in ("hidden_size", "rope_scaling", "unheard", "model_type"):
        with pytest.raises(ConfigError, match="config is nested too deep; expected at most 100"):
            Qwen3MoeConfig.from_hf({field: deep})
    with pytest.raises(ConfigError, match=r"hidden_size is .*; expected a positive integer"):
        Qwen3MoeConfig(hidden_size=deep)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "default"])
def test_integers_beyond_int32_are_numbers(kind):
    """JSON gives integers where a file writes 1 with many zeros; JAX takes those for int32."""
    settings = {"factor": 10**12, "low_freq_factor": 1, "high_freq_factor": 10**12}
    rope = {"type": kind, "short_factor": [10**12] * 2, "long_factor": [10**12] * 2, **settings}
    config = Qwen3MoeConfig.from_hf({"head_dim": 4, "rope_theta": 10**12, "rope_scaling": rope})
    tables = rope_tables(config.rope, 4, 32768, jnp.array([[0, 70000]]), jnp.float32)
    assert all(bool(jnp.isfinite(table).all()) for table in tables)


def test_integers_beyond_int32_become_floats():
    data = {"initializer_range": 10**20, "rms_norm_eps": 2**31, "router_aux_loss_coef": 1}
    config = Qwen3MoeConfig.from_hf(data)
    written = config.to_hf()
    assert {name: written[name] for name in data} == data
    assert [type(written[name]) for name in data] == [float, float, int]


def test_settings_that_the_default_kind_does_not_read_are_written_back():
    scaling = {"rope_type": "default", "factor": 2.0}
    for spelling, name in (("v4", "rope_scaling"), ("v5", "rope_parameters")):
        written = Qwen3MoeConfig.from_hf({"rope_scaling": scaling}).to_hf(spelling)[name]
        assert {key: written[key] for key in scaling} == scaling


def test_files(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CODER))
    assert read_config(path).to_hf() == CODER
    path.write_text(json.dumps(CODER)[:-20])
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        read_config(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON: .*utf-8"):
        read_config(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"config\.json is nested too deep"):
        read_config(path)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match=r"config\.json: config is a list"):
        read_config(path)
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "absent.json")
