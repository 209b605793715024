"""The files beside the weights that a checkpoint takes along: tokenizer, generation settings."""

import pathlib
import shutil

from moe_jax.checkpoints.errors import CheckpointError
from moe_jax.json_files import foreign_content, local_path

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


def sidecar_files(directory: str | pathlib.Path | None) -> list[pathlib.Path]:
    """Those of these files that the directory has; none if it is None.

    Raises:
      CheckpointError: there is no such directory, or a file in it is a git-lfs pointer or HTML.
    """
    if directory is None:
        return []
    directory = local_path(directory, "copy_from")
    if not directory.is_dir():
        raise CheckpointError(f"copy_from is {directory}; expected a directory")
    files = [directory / name for name in _NAMES if (directory / name).is_file()]
    for path in files:
        if foreign := foreign_content(path):
            raise CheckpointError(f"{path} {foreign}")
    return files


def copy_files(files: list[pathlib.Path], target: pathlib.Path) -> None:
    """Copies the files into a directory; a link's target, and not the link."""
    for path in files:
        shutil.copyfile(path, target / path.name)
