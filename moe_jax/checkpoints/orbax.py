"""Qwen3Moe <-> Orbax: a nested dict of arrays; config and schema version in the metadata.

Arrays are written and read in groups of 1 GB, so that a model larger than the host's memory can
pass through. An Orbax save that overwrites removes what was there first; here it writes beside it,
and the two directories are exchanged in the end (see replace_directory).
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from moe_jax.checkpoints import keys
from moe_jax.checkpoints.change_format import dequantised, dequantised_arrays
from moe_jax.checkpoints.errors import CheckpointError, Problems
from moe_jax.checkpoints.placing import Shardings, place, sharding_of
from moe_jax.checkpoints.readers import (
    Progress,
    Reader,
    bytes_of,
    counter,
    expect_float,
    of_model,
)
from moe_jax.checkpoints.replace_directory import replacing
from moe_jax.checkpoints.sidecar_files import copy_files, sidecar_files
from moe_jax.config import Qwen3MoeConfig
from moe_jax.json_files import foreign_content, local_path
from moe_jax.model import Qwen3Moe
from moe_jax.parameters import from_arrays, parameter_shapes
from moe_jax.quantization import VALUES, split_name

SCHEMA_VERSION = 2  # 1 where no parameter is quantised

_GROUP_BYTES = 1 << 30

# Orbax's own test also accepts directories of older layouts, and some that are no checkpoint.
_ORBAX_MARK = "_CHECKPOINT_METADATA"


def save_orbax(
    path: str | pathlib.Path,
    model: Qwen3Moe,
    *,
    overwrite: bool = False,
    copy_from: str | pathlib.Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes parameters, config and schema version as one Orbax checkpoint.

    The directory is replaced whole, when all is on disk: a save that is killed, or that runs out of
    space, leaves the checkpoint before it. Until then both need space. The host holds 1 GB of
    parameters at a time, or one parameter if that is larger, and Orbax twice as much again.

    Args:
      path: the directory; a leading ~ is the home directory, in every function here. Its files that
        belong to no checkpoint are kept.
      model: its parameters are written in the dtypes they have, those in FP8 as values and scales.
      overwrite: whether a checkpoint in the directory may be replaced.
      copy_from: a directory whose tokenizer and generation_config.json are copied.
      progress: called as progress(done_bytes, total_bytes) after each group.

    Raises:
      CheckpointError: the directory holds a checkpoint and overwrite is False, or cannot be
        replaced, or Orbax fails; the model does not fit its config; copy_from is no directory.
    """
    write_orbax(path, of_model(model), overwrite=overwrite, copy_from=copy_from, progress=progress)


def write_orbax(
    path: str | pathlib.Path,
    reader: Reader,
    *,
    overwrite: bool = False,
    copy_from: str | pathlib.Path | None = None,
    progress: Progress | None = None,
) -> None:
    """save_orbax of parameters that may lie anywhere."""
    path = local_path(path, "path")
    files = sidecar_files(copy_from)
    metadata = {"schema_version": _version_of(reader.shapes), "config": reader.config.to_hf()}
    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = storage_of
    count = counter(reader.nbytes, progress)
    with replacing(path, overwrite=overwrite) as new:
        new.rmdir()  # Orbax makes it
        with context:
            for names in _groups(reader.shapes):
                group = {name: reader.read(name) for name in names}
                with errors_of_orbax(f"{path} cannot be written"):
                    ocp.partial.save(new, nested(group), custom_metadata=metadata)
                count(sum(array.nbytes for array in group.values()))
                del group  # before the next is read
            with errors_of_orbax(f"{path} cannot be written"):
                ocp.partial.finalize(new)
        copy_files(files, new)


def load_orbax(
    path: str | pathlib.Path,
    *,
    dtype=None,
    dequantize: bool = False,
    shardings: Shardings | None = None,
    progress: Progress | None = None,
) -> Qwen3Moe:
    """Loads what save_orbax wrote, on any devices.

    Args:
      path: the directory.
      dtype: of every plain parameter: bfloat16, float32 or float16. None keeps the saved ones.
      dequantize: whether parameters in FP8 become plain ones, of bfloat16 if dtype is None.
      shardings: (parameter name, shape) -> jax.sharding.Sharding, as from
        moe_jax.sharding.expert_parallel; each device then reads its own part. None puts everything
        on the default device.
      progress: called as progress(done_bytes, total_bytes) after each group of parameters.

    Raises:
      CheckpointError: no Orbax checkpoint, one that is damaged, of a newer schema version, without
        a config, or whose arrays do not fit its config; lists all that do not.
    """
    path = local_path(path, "path")  # Orbax reads from absolute paths only
    config, saved, shapes = _inspect(path, dtype)
    count = counter(sum(map(bytes_of, shapes.values())), progress)
    arrays = {}
    for names in _groups(shapes):
        targets = {name: _target(name, shapes, shardings) for name in names}
        group = _restore(path, saved, targets)
        for name in names:
            array = group.pop(name)
            if shardings is None:
                array = place(shapes[name], None, lambda index, array=array: array)
            arrays[name] = array
        count(sum(bytes_of(shapes[name]) for name in names))
    if dequantize:
        config, arrays = dequantised_arrays(config, arrays, dtype)
    return from_arrays(config, arrays)


def open_orbax(path: str | pathlib.Path, *, dtype=None, dequantize: bool = False) -> Reader:
    """The checkpoint's parameters, to be read one at a time; arguments and errors as above."""
    path = local_path(path, "path")  # Orbax reads from absolute paths only
    config, saved, shapes = _inspect(path, dtype)

    def read(name: str) -> np.ndarray:
        return _restore(path, saved, {name: _target(name, shapes, None)})[name]

    reader = Reader(config, shapes, read)
    return dequantised(reader, dtype) if dequantize else reader


def _version_of(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Versions of this library that read version 1 alone know no quantised parameters."""
    return SCHEMA_VERSION if any(name.endswith(VALUES) for name in shapes) else 1


def is_orbax(path: pathlib.Path) -> bool:
    """Whether a directory holds an Orbax checkpoint, whole or not."""
    return (path / _ORBAX_MARK).is_file()


def _inspect(path: pathlib.Path, dtype) -> tuple[Qwen3MoeConfig, dict, dict]:
    """The config, the shapes as saved and as asked for; raises as load_orbax does."""
    dtype = None if dtype is None else expect_float(dtype)
    if not is_orbax(path):
        raise CheckpointError(f"{path} is no Orbax checkpoint; expected one from save_orbax")
    if foreign := foreign_content(path / _ORBAX_MARK):
        raise CheckpointError(f"{path / _ORBAX_MARK} {foreign}")
    with errors_of_orbax(f"{path} is damaged", path):
        metadata = ocp.metadata(path)
        found = dict(flat(metadata.metadata))
    config = _config_of(path, metadata.custom_metadata)
    problems = Problems()
    held, wanted = keys.layer_count(found), config.num_hidden_layers
    if held < wanted:
        problems.add("missing", f"all layers from {held} on; num_hidden_layers is {wanted}")
    compared = dataclasses.replace(config, num_hidden_layers=max(1, min(held, wanted)))
    expected = parameter_shapes(compared)
    for name in sorted(expected.keys() - found.keys()):
        problems.add("missing", f"{name}; expected {list(expected[name].shape)}")
    for name in sorted(found.keys() - expected.keys()):
        problems.add("unexpected", f"{name} {list(found[name].shape)}")
    saved = {}
    for name in keys.in_layer_order(expected.keys() & found.keys()):
        shape, saved_dtype = tuple(found[name].shape), np.dtype(found[name].dtype)
        saved[name] = jax.ShapeDtypeStruct(shape, saved_dtype)
        if shape != expected[name].shape:
            problems.add("shape", f"{name} is {list(shape)}; expected {list(expected[name].shape)}")
        if split_name(name)[1]:
            if saved_dtype != expected[name].dtype:
                wanted = expected[name].dtype.name
                problems.add("dtype", f"{name} is {saved_dtype.name}; expected {wanted}")
            continue
        try:
            expect_float(saved_dtype, name)
        except CheckpointError as error:
            problems.add("dtype", str(error))
    problems.raise_if_any(f"{path} does not fit its config")
    asked = {
        name: struct
        if dtype is None or split_name(name)[1]
        else jax.ShapeDtypeStruct(struct.shape, dtype)
        for name, struct in saved.items()
    }
    return config, saved, asked


def _config_of(path: pathlib.Path, metadata: Any) -> Qwen3MoeConfig:
    metadata = metadata or {}
    version, config = metadata.get("schema_version"), metadata.get("config")
    if type(version) is not int or config is None:
        raise CheckpointError(
            f"{path} has no schema_version and config in its metadata; expected a checkpoint that "
            "save_orbax wrote"
        )
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema_version {version}; expected at most {SCHEMA_VERSION}: a later "
            "version of this library wrote it"
        )
    try:
        return Qwen3MoeConfig.from_hf(config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _target(
    name: str, shapes: Mapping[str, jax.ShapeDtypeStruct], shardings: Shardings | None
) -> Any:
    """What to restore into: with a sharding onto its devices, without one into numpy."""
    struct, sharding = shapes[name], sharding_of(shardings, shapes, name)
    if sharding is None:
        return np.broadcast_to(np.zeros((), struct.dtype), struct.shape)
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)


def _restore(path: pathlib.Path, saved: Mapping, targets: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays that `targets` names; the others stay where they are."""
    tree = nested({name: targets.get(name, ocp.PLACEHOLDER) for name in saved})
    what = f"{path} is damaged: of {', '.join(targets)} something cannot be read"
    with errors_of_orbax(what, path):
        restored = dict(flat(ocp.load(path, tree)))
    return {name: restored[name] for name in targets}


@contextlib.contextmanager
def errors_of_orbax(what: str, read_from: pathlib.Path | None = None) -> Iterator[None]:
    """Orbax and TensorStore raise errors of every type, plain Exception included."""
    try:
        yield
    except Exception as error:
        for file in sorted(read_from.rglob("*")) if read_from else ():
            if file.is_file() and (foreign := foreign_content(file)):
                raise CheckpointError(f"{file} {foreign}") from error
        raise CheckpointError(f"{what}; Orbax says: {error}") from error


def _groups(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    """Names in order, as many at a time as _GROUP_BYTES hold and at least one."""
    group, size = [], 0
    for name, struct in shapes.items():
        if group and size + bytes_of(struct) > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += bytes_of(struct)
    yield group


def storage_of(path: tuple, value: Any):
    """An expert is the unit of storage, so that a mesh that splits experts reads its own only."""
    keys_of = (str(getattr(part, "key", "")).split(".") for part in path)
    if not any("experts" in names for names in keys_of):
        return None
    return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,))


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The inverse of nested."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
