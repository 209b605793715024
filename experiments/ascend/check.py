"""Checks an artifact from what lies in its directory: is it whole, and does it compute the same?

1. Every file is the one that was written; the two forms of each function are one module, which
   keeps the rules of the census and takes the arguments that the manifest lists.
2. The sample is what jax.jit computes here from the manifest's config and the weights.
3. The same functions, exported for ["cpu", "ascend"], serialised, deserialised and called on this
   CPU, give what jax.jit gives, bit for bit.
4. IREE compiles the shipped StableHLO and gives it within comparison.BOUNDS, decode steps in a row.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from experiments.ascend import artifact, iree, sample
from experiments.ascend.census import census, violations, without_source_lines
from experiments.ascend.comparison import BOUNDS, EQUAL, Comparison, compare
from experiments.ascend.folder import ArtifactError, read_manifest
from experiments.ascend.load import weights_of
from experiments.ascend.sample import Runner
from experiments.ascend.step import COMPILER_OPTIONS, PHASES, PLATFORM, abstract_arguments
from moe_jax.checkpoints.safetensors_file import read_file
from moe_jax.config import Qwen3MoeConfig


def check(folder: pathlib.Path) -> list[Comparison]:
    """Checks the artifact in a directory; whether a comparison passed, it says itself.

    Raises:
      ArtifactError: a file is damaged, the forms contradict each other, there is nothing to run,
        IREE is missing or does not compile it; the message names the file.
    """
    iree.expect_installed()
    manifest = read_manifest(folder)
    for phase in PHASES:
        _expect_one_module(folder, phase, manifest["functions"][phase])
    if manifest["sample"] is None:
        raise ArtifactError(f"{folder} was exported with --abstract: there is nothing to run")

    config = Qwen3MoeConfig.from_hf(manifest["config"])
    sizes = artifact.sizes_of(manifest)
    steps = manifest["sample"]["decode_steps"]
    prompts, saved = sample.read(folder / manifest["sample"]["file"], steps)
    inputs = (
        sample.flat({"params": _weights(folder, manifest, config, sizes["dtype"])}),
        artifact.cache_of(config, sizes["B"], sizes["capacity"], sizes["dtype"]),
        prompts,
        steps,
    )

    arguments = {phase: abstract_arguments(config, phase, **sizes) for phase in PHASES}
    expected = sample.run_sample(sample.jax_runner(config, arguments), *inputs, follow=saved)
    other_compiler = BOUNDS[manifest["dtype"]]
    comparisons = [compare("the sample", saved, expected, other_compiler)]
    on_iree = iree.iree_runner(folder, manifest["functions"])
    for what, runner, bound in (
        *((what, runner, EQUAL) for what, runner in _reread(config, sizes)),
        ("IREE, the shipped StableHLO", on_iree, other_compiler),
    ):
        found = sample.run_sample(runner, *inputs, follow=saved)
        comparisons.append(compare(what, found, expected, bound))
    return comparisons


def _reread(config: Qwen3MoeConfig, sizes: Mapping[str, Any]) -> Iterator[tuple[str, Runner]]:
    """Artifacts of the same functions that run here, serialised and deserialised.

    JAX 0.11.2 cannot export a composite for two platforms (jax-ml/jax issue 40486), so with a
    superkernel scope there are two: one for both platforms without it, one for cpu with it.
    """
    plain = dataclasses.replace(config, enable_superkernel=False)
    made = {"export for cpu and ascend": (plain, ("cpu", PLATFORM))}
    if config.enable_superkernel:
        made = {f"{what}, no scope": how for what, how in made.items()}
        made["export for cpu"] = (config, ("cpu",))
    for what, (config, platforms) in made.items():
        functions = {
            phase: artifact.export(config, phase, platforms=platforms, **sizes) for phase in PHASES
        }
        reread = {
            phase: jax.jit(
                jax.export.deserialize(function.exported.serialize()).call,
                compiler_options=COMPILER_OPTIONS,
            )
            for phase, function in functions.items()
        }
        arguments = {phase: function.arguments for phase, function in functions.items()}
        yield what, sample.jax_runner(config, arguments, reread)


def _expect_one_module(folder: pathlib.Path, phase: str, described: Mapping[str, Any]) -> None:
    """Raises an ArtifactError unless artifact, text and manifest agree and the census is kept."""
    path, text_path = folder / described["artifact"], folder / described["stablehlo"]
    try:
        exported = jax.export.deserialize(bytearray(path.read_bytes()))
    except Exception as error:  # JAX documents none
        raise ArtifactError(f"{path} cannot be deserialised by this JAX: {error}") from None
    if exported.platforms != (PLATFORM,):
        raise ArtifactError(f"{path} is for {exported.platforms}; expected {(PLATFORM,)}")
    try:
        text = text_path.read_text(encoding="utf-8")
        found = census(text)
    except ValueError as error:
        raise ArtifactError(f"{text_path}: {error}") from None
    if broken := violations(found):
        raise ArtifactError(f"{text_path} is not plain: {broken[0]}")
    composites = [dataclasses.asdict(composite) for composite in found.composites]
    if (found.ops, composites) != (described["ops"], described["composites"]):
        raise ArtifactError(f"{text_path} holds other operations than the manifest says")
    if without_source_lines(exported.mlir_module()) != without_source_lines(text):
        raise ArtifactError(f"{path} holds another module than {text_path}")
    shapes = [(each.shape, each.dtype.name) for each in exported.in_avals]
    listed = [(tuple(each["shape"]), each["dtype"]) for each in described["arguments"]]
    if shapes != listed:
        raise ArtifactError(f"{path} takes other arguments than the manifest lists")


def _weights(folder: pathlib.Path, manifest: Mapping[str, Any], config, dtype) -> dict[str, Any]:
    weights = manifest["weights"]
    if weights["file"]:
        return read_file(folder / weights["file"])
    return weights_of(weights["origin"], config, dtype)
