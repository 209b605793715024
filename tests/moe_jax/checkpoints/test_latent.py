"""Latent projections and shared experts in both checkpoint formats: names, shapes, every bit."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from moe_jax.checkpoints import (
    CheckpointError,
    load_hugging_face,
    load_orbax,
    save_hugging_face,
    save_orbax,
)
from moe_jax.config import Qwen3MoeConfig
from moe_jax.parameters import from_arrays, parameter_shapes, to_arrays
from tests.moe_jax.checkpoints import hub

CONFIG = Qwen3MoeConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    moe_latent_size=6,
    moe_shared_expert_intermediate_size=10,
)
OF_A_LAYER = {
    "mlp.gate.weight": (4, 16),
    "mlp.fc1_latent_proj.weight": (6, 16),
    "mlp.fc2_latent_proj.weight": (16, 6),
    "mlp.shared_experts.gate_proj.weight": (10, 16),
    "mlp.shared_experts.up_proj.weight": (10, 16),
    "mlp.shared_experts.down_proj.weight": (16, 10),
    "mlp.experts.3.gate_proj.weight": (8, 6),
    "mlp.experts.3.up_proj.weight": (8, 6),
    "mlp.experts.3.down_proj.weight": (6, 8),
}


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    shapes = {name: struct.shape for name, struct in parameter_shapes(CONFIG).items()}
    arrays = {name: rng.standard_normal(shape).astype(hub.BF16) for name, shape in shapes.items()}
    return from_arrays(CONFIG, jax.device_put(arrays))


@pytest.mark.parametrize(
    ("save", "load"),
    [(save_hugging_face, load_hugging_face), (save_orbax, load_orbax)],
    ids=["hugging_face", "orbax"],
)
def test_round_trip_is_exact(tmp_path, model, save, load):
    save(tmp_path / "saved", model)
    read = load(tmp_path / "saved")
    assert dataclasses.replace(read.config, extra={}) == CONFIG
    found, expected = (
        {name: np.asarray(array) for name, array in to_arrays(m).items()} for m in (read, model)
    )
    hub.expect_same(found, expected)


def test_names_and_shapes_of_the_folder(tmp_path, model):
    save_hugging_face(tmp_path / "saved", model)
    tensors = hub.read(tmp_path / "saved")
    for name, shape in OF_A_LAYER.items():
        assert tensors[f"model.layers.1.{name}"].shape == shape
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["moe_latent_size"] == 6
    assert written["moe_shared_expert_intermediate_size"] == 10


def test_a_folder_that_lacks_them_is_an_error(tmp_path):
    hub.write(tmp_path, hub.config(moe_latent_size=6), hub.tensors(hub.config()))
    with pytest.raises(CheckpointError, match="fc1_latent_proj"):
        load_hugging_face(tmp_path)
