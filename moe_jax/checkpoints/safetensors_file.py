"""Safetensors files, read and written by the safetensors package.

One thing is done here: floats of 8 bits. The package's numpy frontend, 0.8.0, cannot return such
tensors, so they are mapped from the file, at the place that its header names.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_jax.json_files import foreign_content

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)  # scales of FP8

FLOAT64 = np.dtype(np.float64)

# What checkpoints are read from.
_DTYPES = {
    "F64": FLOAT64,
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": FP8,
    "F8_E8M0": E8M0,
    "U8": np.dtype(np.uint8),
}


class DamagedFileError(ValueError):
    """A file is no whole safetensors file; the message does not name the file."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
      path: its file.
      key: its name there.
      dtype: None if it is none that checkpoints are read from.
      dtype_name: as the file spells it, BF16 for example.
      shape: as the file says.
    """

    path: pathlib.Path
    key: str
    dtype: np.dtype | None
    dtype_name: str
    shape: tuple[int, ...]

    def view(self):
        """What gives numpy arrays when it is indexed with slices, and reads those slices only."""
        if self.dtype in (FP8, E8M0):
            offset = _data_offsets(*_identity(self.path))[self.key]
            return np.memmap(self.path, self.dtype, "r", offset, self.shape)
        return _opened(*_identity(self.path)).get_slice(self.key)


def read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of a file by key; reads the header only.

    Raises:
      DamagedFileError: the file is cut off, a git-lfs pointer or HTML, or its header is not one;
        says what was found.
      FileNotFoundError: there is no such file.
    """
    if path.exists() and not path.is_file():
        raise DamagedFileError("is no file, but a directory or a device")
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            slices = {key: file.get_slice(key) for key in names}
            return {
                key: StoredTensor(
                    path,
                    key,
                    _DTYPES.get(part.get_dtype()),
                    part.get_dtype(),
                    tuple(part.get_shape()),
                )
                for key, part in slices.items()
            }
    except SafetensorError as error:
        if foreign := foreign_content(path):
            raise DamagedFileError(foreign) from None
        size = path.stat().st_size
        raise DamagedFileError(f"is damaged or cut off, at {size} bytes: {error}") from None


def read_file(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a file, those of 8 bits too; raises as read_header does.

    Each must have a dtype that checkpoints are read from.
    """
    header = read_header(path)
    return {
        key: np.asarray(tensor.view()[(slice(None),) * len(tensor.shape)])
        for key, tensor in header.items()
    }


def write_file(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a file.

    Raises:
      OSError: it cannot be written, as on a full disk.
    """
    contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    try:
        # transformers before version 5 refuses a file that does not say whose format it is.
        save_file(contiguous, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _identity(path: pathlib.Path) -> tuple[pathlib.Path, int, int, int]:
    """A path, and what tells its file from another that takes its place."""
    found = os.stat(path)
    return path, found.st_ino, found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=2)
def _opened(path: pathlib.Path, *identity):
    """An open file: a header names thousands of tensors, too many to read it for each of them."""
    return safe_open(path, framework="numpy")


@functools.lru_cache(maxsize=2)
def _data_offsets(path: pathlib.Path, *identity) -> dict[str, int]:
    """Key -> the file's byte at which its data begin. The header is known to be whole."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items()}
