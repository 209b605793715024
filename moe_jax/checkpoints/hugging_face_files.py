"""The files of a Hugging Face directory: its config, and where each tensor lies."""

import dataclasses
import pathlib

import ml_dtypes
import numpy as np

from moe_jax.checkpoints import keys
from moe_jax.checkpoints.errors import CheckpointError, Problems
from moe_jax.checkpoints.safetensors_file import DamagedFileError, StoredTensor, read_header
from moe_jax.config import Qwen3MoeConfig, read_config
from moe_jax.config_checks import shown
from moe_jax.json_files import read_json

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What parameters are stored in, by numpy dtype.
FLOATS = {np.dtype(dtype): dtype.__name__ for dtype in (ml_dtypes.bfloat16, np.float32, np.float16)}


@dataclasses.dataclass
class Found:
    """What the files hold: tensors by key, and what is wrong so far.

    `explained` are the keys that need not be reported as missing, because the error says already
    that their file cannot be read, or that the index is wrong about them.
    """

    tensors: dict[str, StoredTensor] = dataclasses.field(default_factory=dict)
    explained: set[str] = dataclasses.field(default_factory=set)
    problems: Problems = dataclasses.field(default_factory=Problems)

    @property
    def known(self) -> set[str]:
        """Every key that the files hold, or that they would hold if all could be read."""
        return self.tensors.keys() | self.explained


def config_of(directory: pathlib.Path) -> Qwen3MoeConfig:
    """Reads config.json; all that can be wrong with it is a CheckpointError."""
    try:
        return read_config(directory / CONFIG)
    except (FileNotFoundError, NotADirectoryError):
        there = "has no config.json" if directory.is_dir() else "is no directory"
        raise CheckpointError(f"{directory} {there}; expected a Hugging Face directory") from None
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def tensors_of(directory: pathlib.Path) -> Found:
    """All tensors, from one file or from those that the index names; reads headers only.

    A Qwen3MoeModel without its head is saved with keys that do not begin with "model."; here they
    do, as transformers loads it too.

    Raises:
      CheckpointError: there are no weights, or the only file or the index is damaged. What is wrong
        with one file of several is among the problems that are returned.
    """
    found = _read_headers(directory)
    known = found.known
    if keys.EMBEDDING_KEY.removeprefix("model.") in known and not any(
        key.startswith("model.") for key in known
    ):
        found.tensors = {_of_causal_lm(key): tensor for key, tensor in found.tensors.items()}
        found.explained = set(map(_of_causal_lm, found.explained))
    return found


def _of_causal_lm(key: str) -> str:
    return key if key == keys.HEAD_KEY else f"model.{key}"


def _read_headers(directory: pathlib.Path) -> Found:
    index_path, single_path = directory / INDEX, directory / SINGLE_FILE
    if index_path.exists() and single_path.exists():
        raise CheckpointError(
            f"{directory} has both {SINGLE_FILE} and {INDEX}; expected one of them, as the other "
            "may be left over from another checkpoint"
        )
    if not index_path.exists():
        try:
            return Found(read_header(single_path))
        except FileNotFoundError:
            raise CheckpointError(
                f"{directory} has neither {SINGLE_FILE} nor {INDEX}; no other format is read"
            ) from None
        except DamagedFileError as error:
            raise CheckpointError(f"{single_path} {error}") from None
    found = Found()
    file_of = _weight_map(index_path)
    for file in sorted(set(file_of.values())):
        named = {key for key, place in file_of.items() if place == file}
        try:
            header = read_header(directory / file)
        except FileNotFoundError:
            found.problems.add("missing file", f"{file}, with {len(named)} tensors of the index")
            found.explained |= named
            continue
        except DamagedFileError as error:
            found.problems.add("damaged file", f"{file} {error}")
            found.explained |= named
            continue
        for key, tensor in header.items():
            other = found.tensors.setdefault(key, tensor)
            if other is not tensor:
                found.problems.add("duplicate", f"{key} in {other.path.name} and in {file}")
            elif file_of.get(key, file) != file:
                found.problems.add("index", f"{key} is in {file}; the index says {file_of[key]}")
            elif key not in file_of and not keys.is_ignored(key):
                found.problems.add("index", f"{key} is in {file}; the index does not name it")
        for key in sorted(named - header.keys()):
            found.problems.add("index", f"{key} is not in {file}, where the index says it is")
            found.explained.add(key)
    return found


def _weight_map(path: pathlib.Path) -> dict[str, str]:
    accepted = "expected an object whose weight_map maps tensors to files beside it"
    try:
        weight_map = read_json(path)["weight_map"]
        files = set(weight_map.values())
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is malformed: {error!r}; {accepted}") from None
    except ValueError as error:
        raise CheckpointError(f"{error}; {accepted}") from None
    for file in files:
        # an unprintable name, such as one with half of a surrogate pair, is none that can be opened
        plain = isinstance(file, str) and file.isprintable() and file not in ("", "..")
        if not plain or pathlib.PurePath(file).name != file:
            raise CheckpointError(f"{path} names the file {shown(file)}; {accepted}")
    return weight_map
