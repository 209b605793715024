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
from tests.moe_jax.checkpoints import hub

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
