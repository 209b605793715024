"""Converts a checkpoint between Hugging Face's format and Orbax, either way.

    python -m experiments.convert_checkpoint --from=Qwen3-30B-A3B --to=out/orbax --verify

Needs no accelerator; JAX_PLATFORMS=cpu keeps JAX from taking hold of one. Parameters pass through
one at a time, the largest being a layer's stacked experts: 0.8 GB for Qwen3-30B-A3B in bfloat16,
10 GB for Qwen3-Coder-480B-A35B. To Hugging Face the host needs memory for one file (--max_shard_gb)
and one of these, to Orbax for three of these (or 3 GB if they are small). FP8 checkpoints become
bfloat16. --to is written beside its place and put there whole, so a run that is cut off leaves what
was there; it needs the space of both. Tokenizer and generation_config.json are copied along.
"""

import contextlib
import sys
import typing
from collections.abc import Callable, Iterator

import rich.progress
from absl import app, flags, logging
from rich.console import Console

from moe_jax.checkpoints import (
    CheckpointError,
    Format,
    detect_format,
    differences,
    open_checkpoint,
    write_hugging_face,
    write_orbax,
)
from moe_jax.json_files import local_path

_FORMATS = typing.get_args(Format)
_DTYPES = ("", "bfloat16", "float32", "float16")

_FROM = flags.DEFINE_string("from", "", "The checkpoint to read, of either format.")
_TO = flags.DEFINE_string("to", "", "The directory to write.")
_TO_FORMAT = flags.DEFINE_string(
    "to_format", "", f"{' or '.join(_FORMATS)}; the one that --from is not in if empty."
)
_DTYPE = flags.DEFINE_string(
    "dtype", "", f"To convert to: {', '.join(_DTYPES[1:])}; as stored if empty."
)
_MAX_SHARD_GB = flags.DEFINE_float(
    "max_shard_gb", 5.0, "GB (1e9 bytes) of tensors in a safetensors file."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Whether --to may hold a checkpoint already.")
_VERIFY = flags.DEFINE_bool(
    "verify", False, "Read both checkpoints again afterwards and compare every array bit for bit."
)


def main(argv: list[str]) -> None:
    """Checks the flags, converts, verifies; exits 1 with one message if anything fails."""
    if len(argv) > 1:
        sys.exit(f"convert_checkpoint takes flags only; left over: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # absl's default shows a page of Orbax's notes
    # A pipe or a log file is not 80 columns wide just because it says nothing about its width.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    try:
        _check_flags()
        _convert(console)
        if _VERIFY.value:
            _verify(console)
    except (ValueError, NotImplementedError, OSError) as error:
        sys.exit(f"convert_checkpoint: {error}")


def _check_flags() -> None:
    """Raises a ValueError that names the flag."""
    for flag in (_FROM, _TO):
        if not flag.value:
            raise CheckpointError(f"--{flag.name} is empty; expected a directory")
    here, there = (local_path(flag.value, f"--{flag.name}").resolve() for flag in (_FROM, _TO))
    if here == there:
        raise CheckpointError(f"--to is {_TO.value!r}, as --from is; expected another directory")
    for flag, accepted in ((_TO_FORMAT, ("", *_FORMATS)), (_DTYPE, _DTYPES)):
        if flag.value not in accepted:
            raise CheckpointError(
                f"--{flag.name} is {flag.value!r}; expected one of {', '.join(accepted[1:])}"
            )
    if not 1e-9 <= _MAX_SHARD_GB.value < 1e9:
        raise CheckpointError(f"--max_shard_gb is {_MAX_SHARD_GB.value}; expected more than 0")


def _convert(console: Console) -> None:
    is_from = detect_format(_FROM.value)
    to_format = _TO_FORMAT.value or _FORMATS[1 - _FORMATS.index(is_from)]
    reader = open_checkpoint(_FROM.value, dtype=_DTYPE.value or None)
    _say(
        console,
        f"{_FROM.value} ({is_from}): {len(reader.shapes)} arrays, {reader.nbytes / 1e9:.3f} GB",
    )
    with _bar(console, f"writing {to_format}") as progress:
        shared = {"overwrite": _OVERWRITE.value, "copy_from": _FROM.value, "progress": progress}
        if to_format == "orbax":
            write_orbax(_TO.value, reader, **shared)
        else:
            max_shard_bytes = round(_MAX_SHARD_GB.value * 1e9)
            write_hugging_face(_TO.value, reader, max_shard_bytes=max_shard_bytes, **shared)
    _say(console, f"Wrote {_TO.value} ({to_format})")


def _verify(console: Console) -> None:
    """Compares what --from says, converted once more, with what --to says.

    Raises:
      CheckpointError: arrays or the config differ; lists which.
    """
    expected = open_checkpoint(_FROM.value, dtype=_DTYPE.value or None)
    found = open_checkpoint(_TO.value)
    with _bar(console, "verifying") as progress:
        different, checksum = differences(expected, found, progress)
    if different:
        listed = ", ".join(different[:8]) + (", ..." if len(different) > 8 else "")
        raise CheckpointError(
            f"--verify: {_TO.value} differs from {_FROM.value} in {len(different)}: {listed}"
        )
    _say(console, f"Verified: {len(found.shapes)} arrays are equal, bit for bit")
    _say(console, f"sha256 of the arrays: {checksum}")


@contextlib.contextmanager
def _bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over bytes while the block runs; in a log file, one line."""
    if not console.is_terminal:
        _say(console, f"... {what}")
    columns = (
        rich.progress.TextColumn("{task.description:<24}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
