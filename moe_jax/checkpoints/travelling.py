"""The files beside the weights that a checkpoint takes along: tokenizer, generation settings."""

import pathlib
import shutil

from moe_jax.checkpoints.errors import CheckpointError

_NAMES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
)


def travelling_files(directory: str | pathlib.Path | None) -> list[pathlib.Path]:
    """Those of these files that the directory has; none if it is None.

    Raises:
      CheckpointError: there is no such directory.
    """
    if directory is None:
        return []
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"copy_from is {directory}; expected a directory")
    return [directory / name for name in _NAMES if (directory / name).is_file()]


def copy_files(files: list[pathlib.Path], target: pathlib.Path) -> None:
    """Copies the files into a directory; a link's target, and not the link."""
    for path in files:
        shutil.copyfile(path, target / path.name)
