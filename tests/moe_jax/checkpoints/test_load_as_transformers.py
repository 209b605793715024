"""Directories that transformers 5.23 loads, though they are not as published files are: so do we.

What transformers makes of each was seen by loading it there: the logits of `plain`, unless said.
"""

import numpy as np
import pytest

from moe_jax.checkpoints import CheckpointError, load_hugging_face, open_hugging_face
from moe_jax.parameters import to_arrays
from tests.moe_jax.checkpoints import hub
from tests.moe_jax.checkpoints.test_fp8 import QUANTIZATION, quantised
from tests.moe_jax.checkpoints.test_load_errors import error_of

CONFIG = hub.config()
TENSORS = hub.tensors(CONFIG)
EXPERTS = "model.layers.0.mlp.experts."
DOWN = f"{EXPERTS}1.down_proj.weight"


def fuse(tensors: dict, kinds=("gate_up", "down"), layers=(0, 2), ending="weight") -> dict:
    """The tensors with single experts' put together, as transformers 5 holds them."""
    left = dict(tensors)
    for layer in layers:
        at = f"model.layers.{layer}.mlp.experts."
        for kind in kinds:
            parts = [
                [left.pop(f"{at}{e}.{part}_proj.{ending}") for part in kind.split("_")]
                for e in range(4)
            ]
            key = f"{at}{kind}_proj{ending.removeprefix('weight')}"
            left[key] = np.stack([np.concatenate(part) for part in parts])
    return left


def arrays_of(directory, **options) -> dict[str, np.ndarray]:
    """What load_hugging_face makes of a directory."""
    model = load_hugging_face(directory, **options)
    return {name: np.asarray(array) for name, array in to_arrays(model).items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, np.ndarray]:
    return arrays_of(hub.write(tmp_path_factory.mktemp("plain"), CONFIG, TENSORS))


@pytest.mark.parametrize(
    "options",
    [{}, {"kinds": ["gate_up"]}, {"kinds": ["down"], "layers": [2]}],
    ids=["all", "gate_up", "down of one layer"],
)
def test_fused_experts(tmp_path, plain, options):
    hub.write(tmp_path, CONFIG, fuse(TENSORS, **options), files=2)
    calls = []
    found = arrays_of(tmp_path, progress=lambda *call: calls.append(call))
    hub.expect_same(found, plain)
    total = sum(array.nbytes for array in plain.values())
    assert calls[-1] == (total, total)


def test_fused_experts_in_fp8(tmp_path):
    """Scales are fused as the weights are: [E, 2 * I / rows, H / columns]."""
    config = hub.config(quantization_config=QUANTIZATION | {"weight_block_size": [4, 7]})
    tensors, _ = quantised(config)
    apart = arrays_of(hub.write(tmp_path / "apart", config, tensors))
    tensors = fuse(fuse(tensors), ending="weight_scale_inv")
    assert tensors[f"{EXPERTS}gate_up_proj_scale_inv"].shape == (4, 4, 3)
    hub.expect_same(arrays_of(hub.write(tmp_path / "fused", config, tensors)), apart)
    del tensors[f"{EXPERTS}down_proj_scale_inv"]
    tensors[f"{EXPERTS}gate_up_proj_scale_inv"] = np.ones((4, 3, 3), np.float32)
    error = error_of(hub.write(tmp_path / "fused", config, tensors))
    assert sorted(kind for kind, _ in error.problems) == ["missing", "shape"]
    assert "gate_up_proj_scale_inv in model.safetensors is [4, 3, 3]; expected [4, 4, 3]" in str(
        error
    )


def test_fused_fp8_whose_ups_begin_inside_a_block(tmp_path):
    config = hub.config(quantization_config=QUANTIZATION)  # blocks of 10 rows, and 8 gates
    tensors, _ = quantised(config)
    tensors = fuse(fuse(tensors), ending="weight_scale_inv")
    error = error_of(hub.write(tmp_path, config, tensors))
    line = "gate_up_proj in model.safetensors is FP8 with 8 rows of gates; expected a multiple of"
    assert [line in problem for _, problem in error.problems] == [True, True]


def test_fused_experts_of_another_shape_or_beside_single_ones(tmp_path):
    tensors = fuse(TENSORS)
    turned = tensors[f"{EXPERTS}down_proj"].swapaxes(1, 2).copy()
    error = error_of(hub.write(tmp_path, CONFIG, tensors | {f"{EXPERTS}down_proj": turned}))
    line = f"{EXPERTS}down_proj in model.safetensors is [4, 8, 16]; expected [4, 16, 8]"
    assert error.problems == (("shape", line),)
    error = error_of(hub.write(tmp_path, CONFIG, TENSORS | fuse(TENSORS, ["down"], [0])))
    line = f"{EXPERTS}down_proj and 4 such as {EXPERTS}0.down_proj.weight"
    assert error.problems == (("duplicate", line),)


@pytest.mark.parametrize("other", [np.float32, np.float64, np.float16])
def test_one_tensor_of_another_dtype(tmp_path, plain, other):
    """Only a dtype that is given says which of the two a stacked array is to have."""
    hub.write(tmp_path, CONFIG, TENSORS | {DOWN: TENSORS[DOWN].astype(other)})
    with pytest.raises(CheckpointError, match=r"1 problem \(1 dtype\)"):
        load_hugging_face(tmp_path)
    expected = {name: array.astype(np.float32) for name, array in plain.items()}
    expected["layers.0.mlp.experts.down"][1] = TENSORS[DOWN].astype(other)
    hub.expect_same(arrays_of(tmp_path, dtype="float32"), expected)
    reader = open_hugging_face(tmp_path, dtype="float32")
    hub.expect_same({name: reader.read(name) for name in reader.shapes}, expected)


def test_a_config_of_fewer_layers(tmp_path, plain):
    """Transformers leaves the rest unread, and reports it."""
    hub.write(tmp_path, CONFIG | {"num_hidden_layers": 2}, TENSORS)
    with pytest.warns(UserWarning, match="holds layers 0 to 2; those from 2 on are not read"):
        found = arrays_of(tmp_path)
    hub.expect_same(found, {k: v for k, v in plain.items() if not k.startswith("layers.2.")})


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_tied_model_with_its_head_only_or_without_a_prefix(tmp_path, prefix):
    """Qwen3MoeModel, which has no head, saves its keys without "model."."""
    config = CONFIG | {"tie_word_embeddings": True}
    tensors = hub.tensors(config)
    expected = arrays_of(hub.write(tmp_path / "plain", config, tensors))
    if prefix:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    else:
        tensors = {key.removeprefix("model."): array for key, array in tensors.items()}
    for files in (1, 2):
        directory = hub.write(tmp_path / str(files), config, tensors, files=files)
        hub.expect_same(arrays_of(directory), expected)
