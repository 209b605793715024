"""FP8 blocks: loaded and saved as they are, or W = weight * scale with one rounding."""

import json

import ml_dtypes
import numpy as np
import pytest

from moe_jax.checkpoints import CheckpointError, fp8, load_hugging_face, save_hugging_face
from moe_jax.checkpoints.hugging_face_check import inspect
from moe_jax.checkpoints.hugging_face_load import read_slice
from moe_jax.checkpoints.safetensors_file import read_header
from moe_jax.parameters import to_arrays
from tests.moe_jax.checkpoints import hub

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [10, 7],  # divides none of the shapes
}
EXPERT = "model.layers.0.mlp.experts.1.down_proj.weight"
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)


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
        scale = (0.01 + rng.random(blocks, np.float32)).astype(
            E8M0 if scale_dtype == np.uint8 else scale_dtype
        )
        tensors[f"{key}_scale_inv"] = scale.view(scale_dtype) if scale_dtype == np.uint8 else scale
        meant[key] = tensors[key].astype(np.float64)
        for o in range(out):
            for i in range(inside):
                meant[key][o, i] *= np.float64(scale[o // rows, i // columns])
    return tensors, meant


@pytest.fixture
def config():
    return hub.config(quantization_config=QUANTIZATION)


def tensors_of(directory) -> dict[str, np.ndarray]:
    """All tensors; the safetensors package returns none of 8 bits to NumPy."""
    files = sorted(directory.glob("*.safetensors"))
    headers = [read_header(path) for path in files]
    return {
        key: np.asarray(tensor.view()[(slice(None),) * len(tensor.shape)])
        for header in headers
        for key, tensor in header.items()
    }


@pytest.mark.parametrize(
    ("scale_dtype", "scale_fmt"),
    [(np.float32, None), (hub.BF16, None), (E8M0, "ue8m0"), (np.uint8, "ue8m0")],
    ids=str,
)
def test_loads_and_saves_as_it_is(tmp_path, config, scale_dtype, scale_fmt):
    if scale_fmt is not None:
        config["quantization_config"] = QUANTIZATION | {"scale_fmt": scale_fmt}
    tensors, _ = quantised(config, scale_dtype)
    model = load_hugging_face(hub.write(tmp_path / "hub", config, tensors, files=3))
    assert model.config.quantization_config == config["quantization_config"]
    down = model.layers[0].mlp.experts.down
    assert (down.values.dtype, down.scales.dtype, down.block) == (hub.FP8, np.float32, (10, 7))
    assert hub.same(down.values[1], tensors[EXPERT])
    scales = fp8.float32_scales(tensors[f"{EXPERT}_scale_inv"])
    assert hub.same(down.scales[1], scales)

    save_hugging_face(tmp_path / "saved", model, max_shard_bytes=3000)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["quantization_config"] == config["quantization_config"]
    wanted = np.float32 if scale_fmt is None else E8M0
    expected = {
        key: fp8.float32_scales(tensor).astype(wanted) if key.endswith("_scale_inv") else tensor
        for key, tensor in tensors.items()
    }
    hub.expect_same(tensors_of(tmp_path / "saved"), expected)


def test_scales_that_ue8m0_cannot_say(tmp_path, config):
    config["quantization_config"] = QUANTIZATION | {"scale_fmt": "ue8m0"}
    tensors, _ = quantised(config)
    model = load_hugging_face(hub.write(tmp_path / "hub", config, tensors))
    with pytest.raises(CheckpointError, match=r"_scale_inv is 0.* at \[0, 0\]; expected a power"):
        save_hugging_face(tmp_path / "saved", model)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("scale_dtype", [np.float32, np.uint8], ids=str)
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_weights_are_multiplied_and_rounded_once(tmp_path, config, scale_dtype, dtype):
    tensors, meant = quantised(config, scale_dtype)
    hub.write(tmp_path, config, tensors, files=3)
    model = load_hugging_face(tmp_path, dtype=dtype, dequantize=True)
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
    files = inspect(hub.write(tmp_path, config, tensors), dequantize=True)
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


def test_a_layer_that_was_left_in_bfloat16(tmp_path, config):
    tensors, _ = quantised(config)
    key = "model.layers.1.self_attn.q_proj.weight"
    plain = np.ones(tensors[key].shape, hub.BF16)
    del tensors[f"{key}_scale_inv"]
    model = load_hugging_face(hub.write(tmp_path / "hub", config, tensors | {key: plain}))
    assert hub.same(to_arrays(model)["layers.1.self_attn.q_proj.weight"], plain)
    save_hugging_face(tmp_path / "saved", model)
    hub.expect_same(tensors_of(tmp_path / "saved"), tensors | {key: plain})
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    routers = [f"model.layers.{layer}.mlp.gate" for layer in (0, 2)]
    assert saved == QUANTIZATION | {
        "modules_to_not_convert": ["lm_head", *routers, key.removesuffix(".weight")]
    }


def test_a_checkpoint_of_which_nothing_is_fp8(tmp_path, config):
    model = load_hugging_face(hub.write(tmp_path, config, hub.tensors(config)))
    assert model.config.quantization_config is None


def test_experts_that_are_fp8_in_parts(tmp_path, config):
    tensors, _ = quantised(config)

    def plain(*keys):
        left = {key: array for key, array in tensors.items() if not key.startswith(keys)}
        return left | {key: np.ones(tensors[key].shape, hub.BF16) for key in keys}

    layer = "layers.0.mlp.experts"
    downs = [f"model.{layer}.{e}.down_proj.weight" for e in range(4)]
    cases = {
        "one expert": (plain(EXPERT), f"the tensors of {layer}.down are bfloat16, float8_e4m3fn; "),
        "down": (plain(*downs), f"{layer}.gate_up is float8_e4m3fn and {layer}.down is bfloat16; "),
    }
    for name, (changed, line) in cases.items():
        directory = hub.write(tmp_path / name, config, changed)
        ((kind, found),) = problems_of(directory)
        assert kind == "dtype"
        assert line in found
        assert found.endswith("or dequantize=True")
        arrays = to_arrays(load_hugging_face(directory, dequantize=True))
        assert hub.same(arrays[f"{layer}.down"][1], changed[EXPERT])


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
        "scale": {scale: np.array([[127, 1], [255, 0]], np.uint8)},
    }
    lines = {
        "missing": f"{scale}, the scales of {EXPERT} in model.safetensors",
        "shape": f"{scale} in model.safetensors is [2, 1]; expected [2, 2]",
        "dtype": f"{scale} in model.safetensors is I32; expected bfloat16, float32, float16, "
        "float8_e8m0fnu, uint8",
        "scale": f"{scale} in model.safetensors is nan at [1, 0]; expected finite numbers",
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


def test_fp8_in_a_module_that_is_not_to_be_converted(tmp_path, config):
    config["quantization_config"] = QUANTIZATION | {"modules_to_not_convert": ["model.layers.1"]}
    tensors, _ = quantised(config)
    problems = problems_of(hub.write(tmp_path, config, tensors))
    assert {kind for kind, _ in problems} == {"dtype"}
    assert len(problems) == 7  # four of attention, three of the dense MLP
    assert problems[0][1].startswith(
        "model.layers.1.mlp.down_proj.weight in model.safetensors is F8_E4M3, and "
        "modules_to_not_convert names its module; expected bfloat16"
    )


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
        ({"scale_fmt": "e5m3"}, "scale_fmt is 'e5m3'"),
        ({"expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
    ],
)
def test_other_quantisations(tmp_path, change, message):
    config = hub.config(quantization_config=QUANTIZATION | change)
    hub.write(tmp_path, config, hub.tensors(hub.config()))
    with pytest.raises(NotImplementedError, match=f"{message}; expected quant_method 'fp8'"):
        load_hugging_face(tmp_path)
