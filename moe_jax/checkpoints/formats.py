"""Which of the two formats a directory holds, and its parameters whichever it is."""

import pathlib
from typing import Literal

from moe_jax.checkpoints.errors import CheckpointError
from moe_jax.checkpoints.hugging_face_files import CONFIG, INDEX, SINGLE_FILE
from moe_jax.checkpoints.hugging_face_load import open_hugging_face
from moe_jax.checkpoints.orbax import is_orbax, open_orbax
from moe_jax.checkpoints.readers import Reader
from moe_jax.json_files import local_path

Format = Literal["hugging_face", "orbax"]


def detect_format(directory: str | pathlib.Path) -> Format:
    """The format of the checkpoint in a directory, by what it holds.

    Raises:
      CheckpointError: neither format's files are there, or both.
    """
    directory = local_path(directory, "directory")
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; expected a checkpoint")
    hub = any((directory / name).exists() for name in (CONFIG, SINGLE_FILE, INDEX))
    orbax = is_orbax(directory)
    if hub == orbax:
        found = "both formats" if hub else "no checkpoint"
        raise CheckpointError(
            f"{directory} holds {found}; expected {CONFIG} with safetensors, or an Orbax checkpoint"
        )
    return "hugging_face" if hub else "orbax"


def open_checkpoint(
    directory: str | pathlib.Path, *, dtype=None, dequantize: bool = False
) -> Reader:
    """The parameters of a checkpoint of either format, to be read one at a time.

    Args:
      directory: the checkpoint.
      dtype: to read plain ones as: bfloat16, float32 or float16; None as they are stored.
      dequantize: whether those in FP8 become plain, of bfloat16 if dtype is None.

    Raises:
      CheckpointError: there is no checkpoint, or it is not whole.
      NotImplementedError: a quantisation other than FP8 in blocks.
    """
    opened = {"hugging_face": open_hugging_face, "orbax": open_orbax}
    return opened[detect_format(directory)](directory, dtype=dtype, dequantize=dequantize)
