"""Exports both functions and writes the directory: artifacts, StableHLO, manifest, sample."""

import dataclasses
import pathlib
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.extend.mlir.dialects import stablehlo
from safetensors.numpy import save

from experiments.ascend import sample
from experiments.ascend.census import Census, census, violations
from experiments.ascend.folder import SAMPLE, WEIGHTS, ArtifactError, replacing_folder, seal
from experiments.ascend.load import Loaded
from experiments.ascend.settings import Settings
from experiments.ascend.step import PHASES, PLATFORM, abstract_arguments, empty_cache, jitted
from experiments.bench.environment import checked_out_commit
from moe_jax.config import Qwen3MoeConfig

# Larger weights are not written: the manifest says where they come from.
LARGEST_WEIGHTS = 256_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
    """An exported phase.

    Attributes:
      phase: "prefill" or "decode".
      exported: for `platforms`.
      stablehlo: its module's text.
      arguments: names and shapes as abstract_arguments returns them.
      found: the module's census.
    """

    phase: str
    exported: jax.export.Exported
    stablehlo: str
    arguments: dict[str, Any]
    found: Census


def export(config: Qwen3MoeConfig, phase: str, *, platforms=(PLATFORM,), **sizes: Any) -> Function:
    """Exports one phase; allocates no weights.

    Args:
      config: the model's, which says whether there are superkernel scopes.
      phase: "prefill" or "decode".
      platforms: PLATFORM alone for what is shipped; with "cpu" too the artifact runs here.
      sizes: B, S, capacity and dtype, as in abstract_arguments.

    Raises:
      ArtifactError: the module for Ascend alone breaks a rule of the census; lists what.
    """
    arguments = abstract_arguments(config, phase, **sizes)
    exported = jax.export.export(jitted(config, phase), platforms=platforms)(*arguments.values())
    text = exported.mlir_module()
    found = census(text)
    broken = violations(found)
    if broken and platforms == (PLATFORM,):  # one for two platforms has a case between them
        listed = "\n  ".join(broken)
        raise ArtifactError(f"{phase} is not plain enough for {PLATFORM}:\n  {listed}")
    return Function(
        phase=phase, exported=exported, stablehlo=text, arguments=arguments, found=found
    )


def write_artifact(asked: Settings, loaded: Loaded) -> dict[str, Any]:
    """Exports, runs the sample if there are weights, writes the directory; returns the manifest.

    Raises:
      ArtifactError: as export; or --out holds something else.
    """
    sizes = {"B": asked.batch, "S": asked.prompt_length, "capacity": asked.cache_length}
    functions = [export(loaded.config, phase, dtype=loaded.dtype, **sizes) for phase in PHASES]
    with replacing_folder(asked.out) as folder:
        for function in functions:
            name = function.phase
            (folder / f"{name}.jax_export").write_bytes(function.exported.serialize())
            (folder / f"{name}.mlir").write_text(function.stablehlo, encoding="utf-8")
        manifest = {
            "platform": PLATFORM,
            "superkernel": asked.superkernel,
            "config": loaded.config.to_hf(),
            "dtype": loaded.dtype.name,
            **sizes,
            "functions": {function.phase: _described(function) for function in functions},
            "sample": None,
            "weights": {"file": None, "origin": loaded.origin},
            "versions": {
                "jax": jax.__version__,
                "jaxlib": jaxlib.__version__,
                "stablehlo": stablehlo.get_current_version(),
                "calling_convention": functions[0].exported.calling_convention_version,
                "commit": checked_out_commit(),
            },
        }
        if loaded.params is not None:
            manifest["sample"] = _write_sample(folder, asked, loaded, functions)
            manifest["weights"]["file"] = _write_weights(folder, loaded)
        seal(folder, manifest)
    return manifest


def sizes_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `export` that a manifest was made with."""
    sizes = {name: manifest[name] for name in ("B", "S", "capacity")}
    return {**sizes, "dtype": jax.numpy.dtype(manifest["dtype"])}


def signature(function: Function) -> dict[str, Any]:
    """Name, shape and dtype of every argument and result, in calling order."""
    exported = function.exported
    results = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return {
        "arguments": _listed(sample.flat_arguments(function.arguments)),
        "results": _listed(sample.flat(results)),
    }


def _listed(named: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": list(leaf.shape), "dtype": leaf.dtype.name}
        for name, leaf in named.items()
    ]


def _described(function: Function) -> dict[str, Any]:
    found = function.found
    return {
        "artifact": f"{function.phase}.jax_export",
        "stablehlo": f"{function.phase}.mlir",
        **signature(function),
        "composites": [dataclasses.asdict(composite) for composite in found.composites],
        "ops": found.ops,
    }


def _write_sample(folder: pathlib.Path, asked, loaded, functions) -> dict[str, Any]:
    arguments = {function.phase: function.arguments for function in functions}
    rng = np.random.default_rng(asked.seed)
    prompts = sample.draw_prompts(rng, loaded.config.vocab_size, asked.batch, asked.prompt_length)
    results = sample.run_sample(
        sample.jax_runner(loaded.config, arguments),
        sample.flat({"params": loaded.params}),
        cache_of(loaded.config, asked.batch, asked.cache_length, loaded.dtype),
        prompts,
        asked.steps,
    )
    sample.save(folder / SAMPLE, prompts, results)
    return {
        "file": SAMPLE,
        "decode_steps": asked.steps,
        "starts_with": "an empty cache: zeros",
        "made_on": jax.numpy.zeros(()).device.device_kind,
    }


def cache_of(config: Qwen3MoeConfig, B: int, capacity: int, dtype) -> dict[str, jax.Array]:
    """An empty cache by flat name."""
    return sample.flat({"cache": empty_cache(config, B, capacity, dtype)})


def _write_weights(folder: pathlib.Path, loaded: Loaded) -> str | None:
    if sum(array.nbytes for array in loaded.params.values()) > LARGEST_WEIGHTS:
        return None
    arrays = {name: np.asarray(array) for name, array in loaded.params.items()}
    (folder / WEIGHTS).write_bytes(save(arrays))
    return WEIGHTS
