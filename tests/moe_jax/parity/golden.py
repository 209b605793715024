"""Goldens as the tests see them: a case, its model, what it was given and what came out.

They lie in tests/moe_jax/goldens/data, or where the environment variable MOE_GOLDENS says.
"""

import functools
import json
import os
import pathlib
import shutil
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from moe_jax.config import Qwen3MoeConfig
from moe_jax.model import CausalLMOutput, Qwen3Moe
from moe_jax.parameters import from_arrays
from tests.moe_jax.goldens.cases import CASES, Case, replace_keys

COMMITTED = pathlib.Path(__file__).parents[1] / "goldens" / "data"
DIRECTORY = pathlib.Path(os.environ.get("MOE_GOLDENS") or COMMITTED)

# Between float32 models. Over 7 seeds of all cases the largest difference was 2.3e-5 * (1 + value).
TOLERANCE = 1e-4

# Of caches: more than any row holds, and the same for all, so that less is compiled.
CAPACITY = 24


class Golden(NamedTuple):
    """One case of the table and its files.

    Attributes:
      inputs: by the name of the model's argument.
      outputs: by name, as goldens/oracle.py calls them.
      valid: [B, S] bool, the tokens to compare.
    """

    case: Case
    config: Qwen3MoeConfig
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    valid: np.ndarray


@functools.cache
def manifest() -> dict:
    return json.loads((DIRECTORY / "manifest.json").read_text())


@functools.cache
def golden(name: str) -> Golden:
    parts = {"inputs": {}, "outputs": {}}
    for key, tensor in load_file(DIRECTORY / "cases" / f"{name}.safetensors").items():
        part, _, rest = key.partition(".")
        parts[part][rest] = tensor
    case = CASES[name]
    valid = parts["inputs"].get("attention_mask", np.ones((2, case.length), np.int32)) == 1
    config = Qwen3MoeConfig.from_hf(manifest()["cases"][name]["config"])
    return Golden(case=case, config=config, valid=valid, **parts)


def model_of(name: str, **replaced) -> Qwen3Moe:
    """The case's model, by a loader of these tests' own.

    Args:
      name: the case.
      replaced: keys of its config.json to replace, for a model that is wrong on purpose.
    """
    config_json = replace_keys(manifest()["cases"][name]["config"], replaced)
    config = Qwen3MoeConfig.from_hf(config_json)
    return from_arrays(config, _arrays(weights_file(name)))


@functools.cache
def _arrays(file: pathlib.Path) -> dict[str, jax.Array]:
    return {key: jnp.asarray(tensor) for key, tensor in stacked(_tensors(file)).items()}


def hub_tensors(name: str) -> dict[str, np.ndarray]:
    """The case's weights under their hub keys, float32; cases of the same shapes share them."""
    return _tensors(weights_file(name))


@functools.cache
def _tensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    return {key: tensor.astype(np.float32) for key, tensor in load_file(file).items()}


def weights_file(name: str) -> pathlib.Path:
    return DIRECTORY / "weights" / f"{manifest()['cases'][name]['weights']}.safetensors"


def stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hub keys to moe_jax's names, the experts of a layer stacked."""
    found, experts = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix("model.")
        layer, _, rest = name.partition(".mlp.experts.")
        if not rest:
            found[name] = tensor
            continue
        index, projection, _ = rest.split(".")
        experts.setdefault(layer, {})[int(index), projection] = tensor
    for layer, parts in experts.items():
        gate, up, down = (
            np.stack([parts[e, projection] for e in range(len(parts) // 3)])
            for projection in ("gate_proj", "up_proj", "down_proj")
        )
        found[f"{layer}.mlp.experts.gate_up"] = np.stack([gate, up], axis=1)
        found[f"{layer}.mlp.experts.down"] = down
    return found


def write_checkpoint(name: str, directory: pathlib.Path) -> pathlib.Path:
    """Lays the case out as a checkpoint directory: config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    config = manifest()["cases"][name]["config"]
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copyfile(weights_file(name), directory / "model.safetensors")
    return directory


def call(model: Qwen3Moe, found: Golden, **replaced) -> CausalLMOutput:
    """The forward pass that the case records."""
    arguments = {name: jnp.asarray(value) for name, value in found.inputs.items()}
    if isinstance(found.case.keep, int):
        arguments["logits_to_keep"] = found.case.keep
    if found.case.positions == "jumps":
        # as in goldens/oracle.py: without a mask, positions that jump are several sequences
        arguments["attention_mask"] = jnp.asarray(found.valid.astype(np.int32))
    arguments["output_router_logits"] = found.case.router_logits
    return model(**arguments | {"output_hidden_states": True} | replaced)


def as_golden(out: CausalLMOutput) -> dict[str, np.ndarray]:
    """What a call returned, under the names of a golden's outputs."""
    found = {"logits": out.logits, "loss": out.loss, "aux_loss": out.aux_loss}
    for name in ("hidden_states", "router_logits"):
        found |= {f"{name}.{i}": value for i, value in enumerate(getattr(out, name) or ())}
    return {name: np.asarray(value) for name, value in found.items() if value is not None}


def only_valid(outputs: dict[str, np.ndarray], found: Golden) -> dict[str, np.ndarray]:
    """The outputs without what belongs to padding."""
    B, S = found.valid.shape
    kept = {}
    for name, value in outputs.items():
        if value.shape[:2] == (B, S):
            value = value[found.valid]
        elif name.startswith("router_logits"):
            value = value[found.valid.reshape(-1)]
        kept[name] = value
    return kept


def assert_close(found, expected, tolerance: float = TOLERANCE) -> None:
    chex.assert_trees_all_close(found, expected, rtol=tolerance, atol=tolerance)


def assert_matches(model: Qwen3Moe, found: Golden, **replaced) -> None:
    """Everything that the case records of its forward pass comes out, and nothing else."""
    expected = {
        name: value
        for name, value in found.outputs.items()
        if not name.startswith(("cached", "gradients"))
    }
    returned = as_golden(call(model, found, **replaced))
    assert_close(only_valid(returned, found), only_valid(expected, found))


def assert_logits_differ(model: Qwen3Moe, found: Golden, **replaced) -> None:
    """A model or call that is wrong on purpose does not pass: the case can tell."""
    logits = np.asarray(call(model, found, **replaced).logits)
    difference = np.abs(logits - found.outputs["logits"])[found.valid].max()
    assert difference > 100 * TOLERANCE
