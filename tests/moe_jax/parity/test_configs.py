"""Every case's config.json, read and written back in both spellings."""

import dataclasses
import json

import pytest

from moe_jax.config import Qwen3MoeConfig
from tests.moe_jax.goldens.cases import BASE, CASES, ROPE_SETTINGS, replace_keys, rope_v4, rope_v5


@pytest.mark.parametrize("spelling", ["v4", "v5"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost(name, spelling):
    config = Qwen3MoeConfig.from_hf(CASES[name].config_json)
    again = Qwen3MoeConfig.from_hf(json.loads(json.dumps(config.to_hf(spelling))))
    assert again == config
    assert again.extra == config.extra
    assert again.quantization_config == config.quantization_config


@pytest.mark.parametrize("kind", ROPE_SETTINGS)
def test_both_spellings_of_rope_mean_the_same(kind):
    settings = ROPE_SETTINGS[kind]
    old, new = (
        Qwen3MoeConfig.from_hf(replace_keys(BASE, spell(kind, settings)))
        for spell in (rope_v4, rope_v5)
    )
    assert old == new
    assert old.rope.kind == kind
    # `rope_type` inside the old key, which later files of transformers 4 have
    mixed = rope_v4(kind, settings)
    if mixed["rope_scaling"]:
        mixed["rope_scaling"]["rope_type"] = mixed["rope_scaling"].pop("type")
    assert Qwen3MoeConfig.from_hf(replace_keys(BASE, mixed)) == old


@pytest.mark.parametrize(
    "field",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "initializer_range",
        "rms_norm_eps",
        "max_position_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "attention_bias",
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
        "decoder_sparse_step",
        "mlp_only_layers",
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "output_router_logits",
        "router_aux_loss_coef",
        "tie_word_embeddings",
        "quantization_config",
    ],
)
def test_some_case_changes_the_field(field):
    values = [case.config_json.get(field, "absent") for case in CASES.values()]
    assert any(value != BASE.get(field, "absent") for value in values)


def test_every_field_of_the_config_is_in_the_table():
    ours = {
        "rope",
        "router_z_loss_coef",
        "router_dtype",
        "moe_chunk_max_len",
        "moe_latent_size",
        "moe_shared_expert_intermediate_size",
        "enable_superkernel",
        "superkernel_scope",
        "extra",
    }
    fields = {field.name for field in dataclasses.fields(Qwen3MoeConfig)} - ours
    assert fields <= BASE.keys() | {"quantization_config"}
