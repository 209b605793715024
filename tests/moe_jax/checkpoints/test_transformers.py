"""transformers loads what we save, with the same logits, and we load what it saves.

Set PARITY_PYTHON to a Python that has torch and transformers; `make parity` does.
"""

import os
import pathlib
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoints import load_hugging_face, save_hugging_face
from moe_jax.parameters import to_arrays
from tests.moe_jax.checkpoints import hub, test_fp8

PYTHON = os.environ.get("PARITY_PYTHON")

CASES = {
    "plain": ({}, np.float32),
    "bfloat16": ({}, hub.BF16),
    "float16": ({}, np.float16),
    "tied": ({"tie_word_embeddings": True}, np.float32),
    "bias": ({"attention_bias": True}, hub.BF16),
    "all_dense": ({"mlp_only_layers": [0, 1, 2]}, np.float32),
    "v5": ({}, np.float32),
}
# transformers reads blocks of nothing but whole ones.
WHOLE = test_fp8.QUANTIZATION | {"weight_block_size": [4, 8]}
FP8_CASES = {
    "fp8": (WHOLE, np.float32),
    "fp8_of_bfloat16": (WHOLE, hub.BF16),
    "fp8_ue8m0": (WHOLE | {"scale_fmt": "ue8m0"}, test_fp8.E8M0),
    "fp8_in_parts": (WHOLE | {"modules_to_not_convert": ["lm_head", "model.layers.1"]}, np.float32),
}


@pytest.mark.skipif(not PYTHON, reason="PARITY_PYTHON names no Python with transformers")
def test_transformers_reads_ours_and_we_read_theirs(tmp_path):
    ids = np.random.default_rng(0).integers(0, 32, (2, 9))
    np.save(tmp_path / "ids.npy", ids)
    written = {}
    for name, (changes, dtype) in CASES.items():
        config = hub.config(**changes)
        written[name] = hub.tensors(config, np.dtype(dtype))
        model = load_hugging_face(hub.write(tmp_path / name / "hub", config, written[name]))
        save_hugging_face(
            tmp_path / name / "ours",
            model,
            max_shard_bytes=10**9 if name == "plain" else 2000,
            spelling="v5" if name == "v5" else "v4",
        )
    for name, (settings, scale_dtype) in FP8_CASES.items():
        config = hub.config(quantization_config=settings)
        tensors, _ = test_fp8.quantised(config, scale_dtype)
        for key in [key for key in tensors if "layers.1." in key and name == "fp8_in_parts"]:
            if key.endswith("_scale_inv"):
                del tensors[key]
                key = key.removesuffix("_scale_inv")
                tensors[key] = tensors[key].astype(hub.BF16)
        model = load_hugging_face(hub.write(tmp_path / name / "hub", config, tensors))
        assert model.config.quantization_config == settings
        save_hugging_face(tmp_path / name / "ours", model, max_shard_bytes=2000)
    script = pathlib.Path(__file__).with_name("hf_reads_ours.py")
    run = subprocess.run([PYTHON, script, tmp_path], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    for name, (_, dtype) in CASES.items():
        folder = tmp_path / name
        assert (folder / "dtype.txt").read_text() == np.dtype(dtype).name
        model = load_hugging_face(folder / "ours", dtype=jnp.float32)
        logits = np.asarray(model(jnp.asarray(ids)).logits)
        expected = np.load(folder / "logits.npy")
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4, err_msg=name)
        assert np.ptp(expected) > 0.1  # logits that say something
        hub.expect_same(hub.read(folder / "theirs"), written[name])
        theirs, ours = (load_hugging_face(folder / which) for which in ("theirs", "ours"))
        hub.expect_same(to_arrays(theirs), to_arrays(ours))
        assert any(".experts.gate_up_proj" in key for key in hub.read(folder / "fused")) or (
            name == "all_dense"
        )
        hub.expect_same(to_arrays(load_hugging_face(folder / "fused")), to_arrays(ours))
    for name in FP8_CASES:  # what transformers dequantises to, without a GPU, bit for bit
        ours = load_hugging_face(tmp_path / name / "ours", dequantize=True)
        theirs = load_hugging_face(tmp_path / name / "fused")
        hub.expect_same(to_arrays(theirs), to_arrays(ours))
