"""Hugging Face directory -> Qwen3Moe, one stacked array at a time."""

import math
import pathlib
from collections.abc import Callable

import numpy as np

from moe_jax.checkpoints import fp8, keys
from moe_jax.checkpoints.hugging_face_check import HubFiles, inspect
from moe_jax.checkpoints.placing import Shardings, place, sharding_of
from moe_jax.checkpoints.readers import Progress, Reader, counter, expect_float
from moe_jax.checkpoints.safetensors_file import FP8
from moe_jax.json_files import local_path
from moe_jax.model import Qwen3Moe
from moe_jax.parameters import from_arrays
from moe_jax.quantization import SCALES, split_name


def load_hugging_face(
    directory: str | pathlib.Path,
    *,
    dtype=None,
    dequantize: bool = False,
    shardings: Shardings | None = None,
    progress: Progress | None = None,
) -> Qwen3Moe:
    """Loads config.json and model.safetensors, or the files that an index names.

    1. Every file's header is read and compared with the config; nothing is loaded unless all fits.
    2. For each parameter in turn, its tensors go from the file straight to their place in one
       stacked array, cast or dequantised on the way if asked to. One in FP8 has two such arrays.
    3. That array goes to the device, and the host's copy is dropped before the next is made. With
       `shardings` the unit is one device's shard: only its slices are read.

    Args:
      directory: where config.json is; a leading ~ is the home directory, in every function here.
      dtype: of every plain parameter: bfloat16, float32 or float16. None keeps each one's own.
      dequantize: whether parameters in FP8 become plain ones, of bfloat16 if dtype is None.
      shardings: (parameter name, shape) -> jax.sharding.Sharding, as from
        moe_jax.sharding.expert_parallel; None puts everything on the default device. Scales lie
        where moe_jax.sharding.scales_sharding says.
      progress: called as progress(done_bytes, total_bytes) after each tensor of the file.

    Returns:
      The model. Its config has quantization_config None if no weight is in FP8; otherwise that
        names every module whose weights are plain.

    Raises:
      CheckpointError: the directory is no whole Qwen3-MoE checkpoint; lists all that is wrong.
      NotImplementedError: a quantisation other than FP8 in blocks.
    """
    files = _inspect(directory, dtype, dequantize)
    count = counter(_bytes_to_read(files), progress)
    arrays = {}
    for name, struct in files.shapes.items():
        arrays[name] = place(
            struct,
            sharding_of(shardings, files.shapes, name),
            lambda index, name=name: read_slice(files, name, index, count=count),
        )
    return from_arrays(files.config, arrays)


def open_hugging_face(
    directory: str | pathlib.Path, *, dtype=None, dequantize: bool = False
) -> Reader:
    """The directory's parameters, to be read one at a time; arguments and errors as above."""
    files = _inspect(directory, dtype, dequantize)

    def read(name: str) -> np.ndarray:
        return read_slice(files, name, (slice(None),) * len(files.shapes[name].shape))

    return Reader(files.config, files.shapes, read)


def _inspect(directory: str | pathlib.Path, dtype, dequantize: bool) -> HubFiles:
    dtype = None if dtype is None else expect_float(dtype)
    return inspect(local_path(directory, "directory"), dtype, dequantize=dequantize)


def read_slice(
    files: HubFiles,
    name: str,
    index: tuple[slice, ...],
    dtype: np.dtype | None = None,
    count: Callable[[int], None] = lambda nbytes: None,
) -> np.ndarray:
    """One slice of one array, from the slices of its tensors.

    Args:
      index: slices of step 1, one for each dimension.
      dtype: None for the one in files.shapes.
      count: told how many of the file's bytes each tensor's slice took.
    """
    struct = files.shapes[name]
    bounds = [slice(*part.indices(n)[:2]) for part, n in zip(index, struct.shape, strict=True)]
    out = np.empty([part.stop - part.start for part in bounds], dtype or struct.dtype)
    parameter, part = split_name(name)
    for position, place_ in files.places[parameter].items():
        leading, inner = bounds[: len(position)], tuple(bounds[len(position) :])
        if not all(part.start <= i < part.stop for i, part in zip(position, leading, strict=True)):
            continue
        target = out[tuple(i - part.start for i, part in zip(position, leading, strict=True))]
        if part == SCALES:
            _read_scales(files, place_, inner, target)
        else:
            _read_part(files, place_, inner, target)
            count(target.size * files.tensors[place_.key].dtype.itemsize)
    return out


def _read_part(
    files: HubFiles, place_: keys.Place, inner: tuple[slice, ...], out: np.ndarray
) -> None:
    """Reads slices of what lies at a place into an array of their size."""
    tensor, (rows, *columns) = files.tensors[place_.key], inner
    inner = (slice(place_.row + rows.start, place_.row + rows.stop), *columns)
    expert = () if place_.expert is None else (slice(place_.expert, place_.expert + 1),)
    if tensor.dtype == FP8 and out.dtype != FP8:
        whole = (*expert, slice(None), slice(None))
        weight = tensor.view()[whole]
        scale = files.tensors[keys.scale_key(place_.key)].view()[whole]
        if expert:
            weight, scale = weight[0], scale[0]
        fp8.dequantise(weight, scale, files.block, inner, out)
    else:
        out[...] = tensor.view()[(*expert, *inner)].reshape(out.shape)


def _read_scales(
    files: HubFiles, place_: keys.Place, inner: tuple[slice, ...], out: np.ndarray
) -> None:
    """Reads slices of the scales that belong to what lies at a place, as float32."""
    tensor, (rows, columns) = files.tensors[keys.scale_key(place_.key)], inner
    first = place_.row // files.block[0]  # a place begins a block
    index = (slice(first + rows.start, first + rows.stop), columns)
    if place_.expert is not None:
        index = (slice(place_.expert, place_.expert + 1), *index)
    out[...] = fp8.float32_scales(tensor.view()[index]).reshape(out.shape)


def _bytes_to_read(files: HubFiles) -> int:
    """Of all parameters as they are stored; scales and ignored tensors are left out."""
    tensors = {place_.key for places in files.places.values() for place_ in places.values()}
    return sum(
        math.prod(files.tensors[key].shape) * files.tensors[key].dtype.itemsize for key in tensors
    )
