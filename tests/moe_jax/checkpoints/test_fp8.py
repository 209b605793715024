"""FP8 blocks: W = weight * scale, blocks cut off at the edges, one rounding."""

import numpy as np
import pytest

from moe_jax.checkpoints import CheckpointError, fp8, load_hugging_face
from moe_jax.checkpoints.hugging_face_check import inspect
from moe_jax.checkpoints.hugging_face_load import read_slice
from moe_jax.parameters import to_arrays
from tests.moe_jax.checkpoints import hub

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [10, 7],  # divides none of the shapes
}
EXPERT = "model.layers.0.mlp.experts.1.down_proj.weight"


def quantised(config: dict, scale_dtype=np.float32, seed: int = 0) -> tuple[dict, dict]:
    """Tensors with every linear layer in FP8, and what they mean, in float64."""
    rng = np.random.default_rng(seed)
    tensors, meant = hub.tensors(config), {}
    rows, columns = config["quantization_config"]["weight_block_size"]
    for key in list(tensors):
        if not key.endswith("_proj.weight"):
            continue
        out, inside = tensors[key].shape
        tensors[key] = tensors[key].astype(np.float32).astype(hub.FP8)
        blocks = -(-out // rows), -(-inside // columns)
        scale = (0.01 + rng.random(blocks, np.float32)).astype(scale_dtype)
        tensors[f"{key}_scale_inv"] = scale
        meant[key] = tensors[key].astype(np.float64)
        for o in range(out):
            for i in range(inside):
                meant[key][o, i] *= np.float64(scale[o // rows, i // columns])
    return tensors, meant


@pytest.fixture
def config():
    return hub.config(quantization_config=QUANTIZATION)


@pytest.mark.parametrize("scale_dtype", [np.float32, hub.BF16], ids=str)
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_weights_are_multiplied_and_rounded_once(tmp_path, config, scale_dtype, dtype):
    tensors, meant = quantised(config, scale_dtype)
    model = load_hugging_face(hub.write(tmp_path, config, tensors, files=3), dtype=dtype)
    assert model.config.quantization_config is None
    arrays = {name: np.asarray(array) for name, array in to_arrays(model).items()}
    wanted = hub.BF16 if dtype is None else np.dtype(dtype)
    assert {array.dtype for array in arrays.values()} == {wanted}
    found = {
        "model.layers.0.self_attn.k_proj.weight": arrays["layers.0.self_attn.k_proj.weight"],
        "model.layers.1.mlp.gate_proj.weight": arrays["layers.1.mlp.gate_proj.weight"],
        EXPERT: arrays["layers.0.mlp.experts.down"][1],
        "model.layers.2.mlp.experts.3.up_proj.weight": arrays["layers.2.mlp.experts.gate_up"][3, 1],
    }
    for key, array in found.items():
        assert hub.same(array, meant[key].astype(np.float32).astype(wanted)), key
    gate = tensors["model.layers.0.mlp.gate.weight"]
    assert hub.same(arrays["layers.0.mlp.gate.weight"], gate.astype(wanted))


def test_any_slice(config, tmp_path):
    tensors, meant = quantised(config)
    files = inspect(hub.write(tmp_path, config, tensors))
    rng = np.random.default_rng(1)
    whole = meant["model.layers.1.mlp.gate_proj.weight"].astype(np.float32)  # [24, 16]
    for _ in range(50):
        rows, columns = (slice(*sorted(rng.integers(0, n + 1, 2))) for n in whole.shape)
        part = read_slice(
            files, "layers.1.mlp.gate_proj.weight", (rows, columns), np.dtype(np.float32)
        )
        assert hub.same(part, whole[rows, columns])


def test_every_fp8_value_and_a_nan(config):
    weight = np.arange(256, dtype=np.uint8).view(hub.FP8).reshape(16, 16)
    scale = np.ones((2, 3), np.float32)
    out = np.empty((16, 16), np.float32)
    fp8.dequantise(weight, scale, (10, 7), (slice(0, 16), slice(0, 16)), out)
    np.testing.assert_array_equal(out, weight.astype(np.float32))
    assert np.isnan(out).sum() == 2


def test_published_shapes_of_scales():
    assert fp8.scale_shape((768, 2048), (128, 128)) == (6, 16)
    assert fp8.scale_shape((2048, 768), (128, 128)) == (16, 6)
    assert fp8.scale_shape((129, 128), (128, 128)) == (2, 1)


def test_a_layer_that_was_left_in_bfloat16(tmp_path, config):
    tensors, _ = quantised(config)
    key = "model.layers.1.self_attn.q_proj.weight"
    plain = np.ones(tensors[key].shape, hub.BF16)
    del tensors[f"{key}_scale_inv"]
    model = load_hugging_face(hub.write(tmp_path, config, tensors | {key: plain}))
    assert hub.same(to_arrays(model)["layers.1.self_attn.q_proj.weight"], plain)


def problems_of(directory) -> tuple:
    with pytest.raises(CheckpointError) as caught:
        load_hugging_face(directory)
    return caught.value.problems


def test_problems_with_scales(tmp_path, config):
    tensors, _ = quantised(config)
    scale = f"{EXPERT}_scale_inv"
    cases = {
        "missing": {scale: None},
        "shape": {scale: np.ones((2, 1), np.float32)},
        "dtype": {scale: np.ones((2, 2), np.int32)},
    }
    lines = {
        "missing": f"{scale}, the scales of {EXPERT} in model.safetensors",
        "shape": f"{scale} in model.safetensors is [2, 1]; expected [2, 2]",
        "dtype": f"{scale} in model.safetensors is I32; expected bfloat16, float32, float16",
    }
    for kind, change in cases.items():
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        assert problems_of(hub.write(tmp_path / kind, config, changed)) == ((kind, lines[kind]),)


def test_scales_of_what_is_not_fp8(tmp_path, config):
    tensors, _ = quantised(config)
    tensors["lm_head.weight_scale_inv"] = np.ones((4, 3), np.float32)
    problems = problems_of(hub.write(tmp_path, config, tensors))
    line = "lm_head.weight_scale_inv [4, 3] in model.safetensors"
    assert problems == (("unexpected", line),)


@pytest.mark.parametrize(
    "key", ["lm_head.weight", "model.layers.0.mlp.gate.weight", "model.embed_tokens.weight"]
)
def test_what_is_never_quantised(tmp_path, config, key):
    tensors, _ = quantised(config)
    tensors[key] = tensors[key].astype(hub.FP8)
    ((kind, line),) = problems_of(hub.write(tmp_path, config, tensors))
    assert kind == "dtype"
    assert f"{key} in model.safetensors is F8_E4M3; expected bfloat16" in line
    assert line.endswith("or F8_E4M3 if *_proj.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"quant_method": None}, "quant_method is None"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"activation_scheme": "static"}, "activation_scheme is 'static'"),
        ({"weight_block_size": None}, "weight_block_size is None"),
        ({"weight_block_size": [128]}, r"weight_block_size is \[128\]"),
        ({"weight_block_size": [128, 0]}, r"weight_block_size is \[128, 0\]"),
    ],
)
def test_other_quantisations(tmp_path, change, message):
    config = hub.config(quantization_config=QUANTIZATION | change)
    hub.write(tmp_path, config, hub.tensors(hub.config()))
    with pytest.raises(NotImplementedError, match=f"{message}; expected quant_method 'fp8'"):
        load_hugging_face(tmp_path)
