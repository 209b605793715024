"""Qwen3Moe -> Hugging Face directory, with the hub's keys."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator

import numpy as np

from moe_jax.checkpoints import keys
from moe_jax.checkpoints.errors import CheckpointError, Problems
from moe_jax.checkpoints.hugging_face_files import CONFIG, FLOATS, INDEX, SINGLE_FILE
from moe_jax.checkpoints.readers import Progress, Reader, counter, of_model
from moe_jax.checkpoints.replace_directory import replacing
from moe_jax.checkpoints.safetensors_file import E8M0, write_file
from moe_jax.checkpoints.sidecar_files import copy_files, sidecar_files
from moe_jax.config import Qwen3MoeConfig
from moe_jax.json_files import local_path
from moe_jax.model import Qwen3Moe
from moe_jax.quantization import SCALES, VALUES, split_name


def save_hugging_face(
    directory: str | pathlib.Path,
    model: Qwen3Moe,
    *,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    copy_from: str | pathlib.Path | None = None,
    spelling: str = "v4",
    progress: Progress | None = None,
) -> None:
    """Writes config.json and safetensors files that `transformers` loads.

    The directory is replaced whole, when all is on disk: a save that is killed, or that runs out of
    space, leaves the checkpoint before it. Until then both need space. The tensors of one
    file at a time are on the host.

    Args:
      directory: made if there is none; a leading ~ is the home directory. Its files that belong to
        no checkpoint are kept.
      model: its parameters are written in the dtypes they have, those in FP8 as values and scales
        in blocks; scales are float32, or float8_e8m0fnu where quantization_config's scale_fmt is
        "ue8m0".
      max_shard_bytes: of tensors in a file; a tensor of more gets a file of its own. With more than
        one file there is a model.safetensors.index.json.
      overwrite: whether a checkpoint in the directory may be replaced.
      copy_from: a directory whose tokenizer and generation_config.json are copied.
      spelling: of config.json, "v4" (which transformers 5 reads too) or "v5".
      progress: called as progress(done_bytes, total_bytes) after each file.

    Raises:
      CheckpointError: the directory holds a checkpoint and overwrite is False, or cannot be
        replaced; the model does not fit its config or has a dtype that is no stored float; a scale
        of the format ue8m0 is no power of two; copy_from is no directory.
      ValueError: max_shard_bytes is not a positive integer.
    """
    write_hugging_face(
        directory,
        of_model(model),
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        copy_from=copy_from,
        spelling=spelling,
        progress=progress,
    )


def write_hugging_face(
    directory: str | pathlib.Path,
    reader: Reader,
    *,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    copy_from: str | pathlib.Path | None = None,
    spelling: str = "v4",
    progress: Progress | None = None,
) -> None:
    """save_hugging_face of parameters that may lie anywhere."""
    if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes!r}; expected a positive integer")
    directory = local_path(directory, "directory")
    files = sidecar_files(copy_from)
    tensors = _tensors_of(reader)
    shards = _plan(tensors, max_shard_bytes)
    config = _config_json(reader, spelling)
    values = _values(reader, tensors)
    count = counter(reader.nbytes, progress)
    with replacing(directory, overwrite=overwrite) as new:
        for file, keys_here in shards.items():
            # nothing here keeps a file's tensors while the next file's are read
            write_file(new / file, {key: next(values) for key in keys_here})
            count(sum(tensors[key].nbytes for key in keys_here))
        if len(shards) > 1:
            _write_json(new / INDEX, _index_json(tensors, shards))
        copy_files(files, new)
        _write_json(new / CONFIG, config)


@dataclasses.dataclass(frozen=True)
class _Part:
    """One tensor of the file: an array of the model, or one expert's part of one."""

    name: str
    position: tuple[int, ...]
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def _tensors_of(reader: Reader) -> dict[str, _Part]:
    """Hub key -> part, in the order of writing."""
    problems = Problems()
    for name, struct in reader.shapes.items():
        if np.dtype(struct.dtype) not in FLOATS and split_name(name)[1] != VALUES:
            accepted = ", ".join(FLOATS.values())
            problems.add("dtype", f"{name} is {struct.dtype}; expected {accepted}")
    problems.raise_if_any("the model cannot be saved")
    found = reader.config.quantization_config or {}
    dtype_of_scales = E8M0 if found.get("scale_fmt") == "ue8m0" else np.dtype(np.float32)

    def dtype_of(name: str) -> np.dtype:
        is_scales = split_name(name)[1] == SCALES
        return dtype_of_scales if is_scales else np.dtype(reader.shapes[name].dtype)

    return {
        key: _Part(name, position, dtype_of(name), struct.shape[len(position) :])
        for name, struct in reader.shapes.items()
        for position, key in keys.hub_keys(name, struct.shape).items()
    }


def _plan(tensors: dict[str, _Part], max_shard_bytes: int) -> dict[str, list[str]]:
    """File name -> keys, filling one file after the other."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, part in tensors.items():
        if shards[-1] and size + part.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += part.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _values(reader: Reader, tensors: dict[str, _Part]) -> Iterator[np.ndarray]:
    """The tensors in order; a parameter stays on the host while its parts are written."""
    name, array = None, None
    for key, part in tensors.items():
        if part.name != name:
            array = None  # before the next is read
            name, array = part.name, reader.read(part.name)
        stored = array[part.position]
        if stored.dtype != part.dtype:
            stored = _powers_of_two(key, stored)
        yield stored


def _powers_of_two(key: str, scales: np.ndarray) -> np.ndarray:
    """float32 scales as E8M0.

    Raises:
      CheckpointError: one is no power of two.
    """
    stored = scales.astype(E8M0)
    for at in np.argwhere(stored.astype(np.float32) != scales)[:1].tolist():
        raise CheckpointError(
            f"{key} is {scales[tuple(at)]} at {at}; expected a power of two, because "
            "quantization_config has scale_fmt 'ue8m0'"
        )
    return stored


def _index_json(tensors: dict[str, _Part], shards: dict[str, list[str]]) -> dict:
    return {
        "metadata": {"total_size": sum(part.nbytes for part in tensors.values())},
        "weight_map": {key: file for file, keys_here in shards.items() for key in keys_here},
    }


def _config_json(reader: Reader, spelling: str) -> dict:
    config: Qwen3MoeConfig = reader.config
    if not any(name.endswith(VALUES) for name in reader.shapes):  # whatever the file once was
        config = dataclasses.replace(config, quantization_config=None)
    data = config.to_hf(spelling)
    data.setdefault("architectures", ["Qwen3MoeForCausalLM"])
    # transformers loads in this dtype, so it must be the one on disk and not the one of long ago.
    data.pop("torch_dtype", None)
    data.pop("dtype", None)
    dtype = FLOATS[np.dtype(reader.shapes["embed_tokens.weight"].dtype)]
    data["torch_dtype" if spelling == "v4" else "dtype"] = dtype
    return data


def _write_json(path: pathlib.Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
