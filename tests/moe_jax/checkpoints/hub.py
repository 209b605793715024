"""Tiny directories as on the hub, written by the safetensors package and none of our code."""

import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
F32 = np.dtype(np.float32)

# What a clone without git-lfs, and a download without a login, leave in place of a file.
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 3998893112\n"
HTML = "\n<!DOCTYPE html>\n<html><body>Log in</body></html>"

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 7,
}


def config(**changes) -> dict:
    """A tiny config.json: layers 0 and 2 have experts, layer 1 is dense."""
    return CONFIG | changes


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every key of the hub's files and its shape."""
    H, D, V = config["hidden_size"], config["head_dim"], config["vocab_size"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    E, moe_I, I = (
        config["num_experts"],
        config["moe_intermediate_size"],
        config["intermediate_size"],
    )
    found = {"model.embed_tokens.weight": (V, H)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        found[f"{at}.input_layernorm.weight"] = (H,)
        found[f"{at}.post_attention_layernorm.weight"] = (H,)
        for name, shape in {
            "q": (heads * D, H),
            "k": (kv * D, H),
            "v": (kv * D, H),
            "o": (H, heads * D),
        }.items():
            found[f"{at}.self_attn.{name}_proj.weight"] = shape
            if config.get("attention_bias"):
                found[f"{at}.self_attn.{name}_proj.bias"] = shape[:1]
        found[f"{at}.self_attn.q_norm.weight"] = found[f"{at}.self_attn.k_norm.weight"] = (D,)
        if layer in config["mlp_only_layers"]:
            mlps = {f"{at}.mlp": I}
        else:
            found[f"{at}.mlp.gate.weight"] = (E, H)
            mlps = {f"{at}.mlp.experts.{e}": moe_I for e in range(E)}
        for mlp, width in mlps.items():
            found[f"{mlp}.gate_proj.weight"] = found[f"{mlp}.up_proj.weight"] = (width, H)
            found[f"{mlp}.down_proj.weight"] = (H, width)
    found["model.norm.weight"] = (H,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (V, H)
    return found


def tensors(config: dict, dtype=BF16, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors for every key."""
    rng = np.random.default_rng(seed)
    return {
        key: rng.standard_normal(shape, np.float32).astype(dtype)
        for key, shape in shapes(config).items()
    }


def write(
    directory: pathlib.Path,
    config: dict,
    tensors: dict[str, np.ndarray],
    *,
    files: int = 1,
) -> pathlib.Path:
    """Writes config.json and the tensors, dealt out over several files with an index if asked."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    weight_map = {}
    for i in range(files):
        name = f"model-{i + 1:05}-of-{files:05}.safetensors"
        here = {key: value for n, (key, value) in enumerate(tensors.items()) if n % files == i}
        save_file(here, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(here, name)
    write_index(directory, weight_map)
    return directory


def write_index(directory: pathlib.Path, weight_map: dict[str, str]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)


def read_index(directory: pathlib.Path) -> dict[str, str]:
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]


def read(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, by the safetensors package."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal in shape, dtype and every bit."""
    one, other = np.asarray(one), np.asarray(other)
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and np.array_equal(
            np.ascontiguousarray(one).reshape(-1).view(np.uint8),
            np.ascontiguousarray(other).reshape(-1).view(np.uint8),
        )
    )


def expect_same(found: dict, expected: dict) -> None:
    """Asserts that two mappings hold the same arrays, bit for bit."""
    assert found.keys() == expected.keys()
    different = [key for key in expected if not same(found[key], expected[key])]
    assert not different


def bytes_of(directory: pathlib.Path) -> dict[str, bytes]:
    """Everything in a directory, by relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
