"""Latent projections and shared experts in both checkpoint formats: names, shapes, every bit."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.checkpoints import (
    CheckpointError,
    load_hugging_face,
    load_orbax,
    save_hugging_face,
    save_orbax,
)
from moe_jax.model import Qwen3Moe
from moe_jax.parameters import to_arrays
from moe_jax.presets import PRESETS
from tests.moe_jax.checkpoints import hub

# L is 32 and the shared experts' width 48, beside H = I = 64.
CONFIG = dataclasses.replace(
    PRESETS["tiny"], moe_latent_size=32, moe_shared_expert_intermediate_size=48
)
OF_A_LAYER = {
    "mlp.gate.weight": (8, 64),
    "mlp.fc1_latent_proj.weight": (32, 64),
    "mlp.fc2_latent_proj.weight": (64, 32),
    "mlp.shared_experts.gate_proj.weight": (48, 64),
    "mlp.shared_experts.up_proj.weight": (48, 64),
    "mlp.shared_experts.down_proj.weight": (64, 48),
    "mlp.experts.3.gate_proj.weight": (64, 32),
    "mlp.experts.3.up_proj.weight": (64, 32),
    "mlp.experts.3.down_proj.weight": (32, 64),
}


@pytest.fixture(scope="module")
def model():
    return Qwen3Moe(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)


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
    ids = jnp.array([[3, 1, 4, 1, 5]])
    np.testing.assert_array_equal(read(ids).logits, model(ids).logits)


def test_names_and_shapes_of_the_folder(tmp_path, model):
    save_hugging_face(tmp_path / "saved", model)
    tensors = hub.read(tmp_path / "saved")
    for name, shape in OF_A_LAYER.items():
        assert tensors[f"model.layers.1.{name}"].shape == shape
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["moe_latent_size"] == 32
    assert written["moe_shared_expert_intermediate_size"] == 48


def test_a_folder_that_lacks_them_is_an_error(tmp_path):
    plain = Qwen3Moe(PRESETS["tiny"], rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    save_hugging_face(tmp_path / "saved", plain)
    path = tmp_path / "saved" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"moe_latent_size": 64}))
    with pytest.raises(CheckpointError, match="fc1_latent_proj"):
        load_hugging_face(tmp_path / "saved")
