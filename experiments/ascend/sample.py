"""A prefill and decode steps in a row, by whatever can run them: JAX, IREE or the target.

Arrays have flat names, as the manifest lists them: "input_ids", "cache/keys/0", "logits". In
sample.safetensors a result's name has its call before it: "prefill/logits", "decode_0/next_ids".
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file
from safetensors.numpy import save as save_safetensors

from experiments.ascend.step import PHASES, jitted
from moe_jax.config import Qwen3MoeConfig

Named = dict[str, np.ndarray]
# (phase, its arguments by flat name) -> its results by flat name
Runner = Callable[[str, Mapping[str, np.ndarray]], Named]

_PROMPT = ("input_ids", "attention_mask")


def flat(tree: Any) -> dict[str, Any]:
    """The leaves by name, in the order in which JAX flattens them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def flat_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Likewise of a phase's arguments, in calling order."""
    named = [flat({name: argument}) for name, argument in arguments.items()]
    return {name: leaf for leaves in named for name, leaf in leaves.items()}


def jax_runner(
    config: Qwen3MoeConfig,
    arguments: Mapping[str, Mapping[str, Any]],
    functions: Mapping[str, Callable] | None = None,
) -> Runner:
    """Runs a phase in JAX, on its default device.

    Args:
      config: the model's.
      arguments: phase -> what abstract_arguments returns.
      functions: phase -> a function of these arguments; None compiles those of step.py.
    """
    functions = functions or {phase: jitted(config, phase) for phase in PHASES}

    def runner(phase: str, named: Mapping[str, np.ndarray]) -> Named:
        structure = jax.tree.structure(tuple(arguments[phase].values()))
        given = structure.unflatten([named[name] for name in flat_arguments(arguments[phase])])
        return {name: np.asarray(array) for name, array in flat(functions[phase](*given)).items()}

    return runner


def draw_prompts(rng: np.random.Generator, V: int, B: int, S: int) -> Named:
    """Random prompts: input_ids [B, S] and attention_mask [B, S], int32.

    The first row is full; the others have padding on the left, as it comes.
    """
    lengths = rng.integers(1, S + 1, B)
    lengths[0] = S
    mask = np.arange(S)[None] >= (S - lengths)[:, None]
    ids = np.where(mask, rng.integers(0, V, (B, S)), 0)
    return {"input_ids": ids.astype(np.int32), "attention_mask": mask.astype(np.int32)}


def run_sample(
    runner: Runner,
    params: Mapping[str, np.ndarray],
    cache: Mapping[str, np.ndarray],
    prompts: Named,
    steps: int,
    follow: Sequence[Named] | None = None,
) -> list[Named]:
    """Runs the prefill, then `steps` decode steps, each on the cache of the one before.

    Args:
      runner: what runs them.
      params: by flat name.
      cache: an empty one, by flat name.
      prompts: as draw_prompts returns them.
      steps: at least 0.
      follow: results whose tokens are taken in place of the runner's own, so that two runners stay
        comparable where they choose differently.

    Returns:
      1 + steps results.
    """
    results = [runner("prefill", {**params, **prompts, **cache})]
    for step in range(steps):
        ids = (follow or results)[step]["next_ids"][:, None]
        cache = {name: results[-1][name] for name in cache}
        results.append(runner("decode", {**params, "input_ids": ids, **cache}))
    return results


def save(path: pathlib.Path, prompts: Named, results: Sequence[Named]) -> None:
    """Writes prompts, every call's logits and tokens, and the first and the last call's cache."""
    kept = dict(prompts)
    for index, result in enumerate(results):
        with_cache = index in (0, len(results) - 1)
        for name, array in result.items():
            if with_cache or not name.startswith("cache/"):
                kept[f"{_call(index)}/{name}"] = np.ascontiguousarray(array)
    path.write_bytes(save_safetensors(kept))  # the package's own writer makes files private


def read(path: pathlib.Path, steps: int) -> tuple[Named, list[Named]]:
    """What `save` wrote."""
    held = load_file(path)
    prompts = {name: held[name] for name in _PROMPT}
    calls = [f"{_call(index)}/" for index in range(1 + steps)]
    return prompts, [
        {name.removeprefix(call): held[name] for name in held if name.startswith(call)}
        for call in calls
    ]


def _call(index: int) -> str:
    return f"decode_{index - 1}" if index else "prefill"
