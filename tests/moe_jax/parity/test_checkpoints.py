"""Checkpoint directories: those of transformers load as the goldens say, and ours are theirs.

With MOE_SAVED set, the directories that we save stay there, for goldens/check_saved.py.
"""

import dataclasses
import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from moe_jax.checkpoints import load_hugging_face, save_hugging_face
from moe_jax.checkpoints.safetensors_file import read_file
from moe_jax.config import Qwen3MoeConfig
from moe_jax.parameters import to_arrays
from tests.moe_jax.goldens.cases import CASES, FP8_CASES
from tests.moe_jax.parity.golden import (
    assert_logits_differ,
    assert_matches,
    golden,
    hub_tensors,
    manifest,
    model_of,
    stacked,
    write_checkpoint,
)

FP8 = [case.name for case in FP8_CASES]
# One of each set of shapes, and every kind of RoPE.
NAMES = [
    name
    for name, record in manifest()["cases"].items()
    if (record["weights"] == name or "inside" in name) and name not in FP8
]


@pytest.mark.parametrize("name", NAMES)
def test_load(name, tmp_path):
    model = load_hugging_face(write_checkpoint(name, tmp_path), dtype=jnp.float32)
    assert model.config == golden(name).config
    found, expected = to_arrays(model), stacked(hub_tensors(name))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


@pytest.mark.parametrize("name", FP8)
def test_fp8(name, tmp_path):
    model = load_hugging_face(write_checkpoint(name, tmp_path), dtype=jnp.float32)
    assert model.config.quantization_config == CASES[name].config_json["quantization_config"]
    assert_matches(functools.partial(compiled, model), golden(name))


@pytest.mark.parametrize("name", FP8)
def test_fp8_is_saved_as_it_was(name, tmp_path):
    directory = write_checkpoint(name, tmp_path / "hub")
    model = load_hugging_face(directory)
    # transformers, which reads what is kept, takes whole blocks only
    kept = os.environ.get("MOE_SAVED") if name == "fp8_8x4" else None
    saved = pathlib.Path(kept or tmp_path) / "v4" / name
    save_hugging_face(saved, model)
    found, expected = (read_file(path / "model.safetensors") for path in (saved, directory))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        is_scale = key.endswith("_scale_inv")  # written as float32
        np.testing.assert_array_equal(
            found[key], value.astype(np.float32) if is_scale else value, err_msg=key
        )
    configs = [json.loads((path / "config.json").read_text()) for path in (saved, directory)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


STATIC = ("logits_to_keep", "output_hidden_states", "output_router_logits")


@functools.partial(jax.jit, static_argnames=STATIC)
def compiled(model, **arguments):
    """One program, because one for each operation takes longer."""
    return model(**arguments)


def test_fp8_scales_are_read_by_block(tmp_path):
    # with the two sides of a block swapped the shapes of the scales do not fit
    directory = write_checkpoint("fp8_8x4", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [4, 8]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weight_scale_inv"):
        load_hugging_face(directory, dtype=jnp.float32)


@pytest.mark.parametrize("spelling", ["v4", "v5"])
@pytest.mark.parametrize("name", NAMES)
def test_save(name, spelling, tmp_path):
    kept = os.environ.get("MOE_SAVED")
    directory = pathlib.Path(kept or tmp_path) / spelling / name
    save_hugging_face(directory, model_of(name), spelling=spelling)

    found, expected = load_file(directory / "model.safetensors"), hub_tensors(name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    saved = json.loads((directory / "config.json").read_text())
    read = Qwen3MoeConfig.from_hf(saved)
    # the dtype's key is respelt too, and none of ours
    assert dataclasses.replace(read, extra=golden(name).config.extra) == golden(name).config
    assert_same_keys(saved, CASES[name].config_json, spelling)


def assert_same_keys(saved: dict, original: dict, spelling: str) -> None:
    """What the original said is said again, in the same words where they are of this spelling."""
    respelt = {"rope_theta", "rope_scaling", "rope_parameters", "num_experts", "num_local_experts"}
    for key, value in original.items():
        if key not in respelt | {"torch_dtype"}:
            assert saved[key] == value, key
    new = {"rope_parameters", "num_local_experts", "dtype"}
    old = {"rope_theta", "rope_scaling", "num_experts", "torch_dtype"}
    wanted, other = (old, new) if spelling == "v4" else (new, old)
    assert wanted <= saved.keys()
    assert not other & saved.keys()
    assert saved.get("dtype", saved.get("torch_dtype")) == "float32"


def test_a_wrong_scale_would_be_seen(tmp_path):
    name = "fp8_128x128"
    model = load_hugging_face(write_checkpoint(name, tmp_path), dtype=jnp.float32)
    scales = model.layers[0].mlp.experts.gate_up.scales
    scales[...] = scales[...].at[:, 0, 1].multiply(1.5)  # the second block's rows
    assert_logits_differ(functools.partial(compiled, model), golden(name))
