"""An artifact's directory: what it holds, how it is put in place whole, how it is read again."""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from moe_jax.checkpoints.replace_directory import replaced_whole
from moe_jax.json_files import read_json

MANIFEST = "manifest.json"
SAMPLE, WEIGHTS = "sample.safetensors", "weights.safetensors"
FORMAT, VERSION = "warp-decode-moe.ascend", 1

NAMES = frozenset(
    {MANIFEST, SAMPLE, WEIGHTS}
    | {f"{phase}.{ending}" for phase in ("prefill", "decode") for ending in ("jax_export", "mlir")}
)


class ArtifactError(ValueError):
    """An artifact cannot be written, read or run; the message names the file."""


@contextlib.contextmanager
def replacing_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty directory that takes the place of `out` when the block ends, whole.

    If the block raises, or is killed, nothing has changed.

    Raises:
      ArtifactError: `out` holds something else than an artifact.
      CheckpointError: as moe_jax.checkpoints.replace_directory.replaced_whole.
    """
    expect_replaceable(out)
    with replaced_whole(out) as new:
        yield new


def expect_replaceable(out: pathlib.Path) -> None:
    """Raises an ArtifactError if there is something that is neither empty nor an artifact."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ArtifactError(f"--out is {str(out)!r}, a file; expected a directory")
    names = {path.name for path in out.iterdir()}
    if names and (MANIFEST not in names or names - NAMES):
        strange = sorted(names - NAMES) or sorted(names)
        raise ArtifactError(
            f"--out is {str(out)!r}, which holds {strange[0]}; expected a new or empty directory, "
            "or an artifact to replace"
        )


def seal(folder: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest last, with the size and the checksum of every other file."""
    files = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
    head = {"format": FORMAT, "format_version": VERSION}
    text = json.dumps({**head, **manifest, "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """The manifest, after every file that it lists was found to be whole.

    Raises:
      ArtifactError: there is no artifact, or a file is missing or not what was written.
    """
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no artifact: there is no {MANIFEST}") from None
    except ValueError as error:
        raise ArtifactError(str(error)) from None
    found = (
        (manifest.get("format"), manifest.get("format_version"))
        if isinstance(manifest, dict)
        else type(manifest).__name__
    )
    if found != (FORMAT, VERSION):
        raise ArtifactError(f"{path} is of format {found}; expected {(FORMAT, VERSION)}")
    for name, expected in manifest["files"].items():
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder / name} is missing; export again")
        actual = _fingerprint(folder / name)
        for what in ("bytes", "sha256"):
            if actual[what] != expected[what]:
                raise ArtifactError(
                    f"{folder / name} was cut off or changed: its {what} is {actual[what]}; "
                    f"expected {expected[what]}, as it was written"
                )
    return manifest


def _fingerprint(path: pathlib.Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
