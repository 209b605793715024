"""Converts a checkpoint between Hugging Face's format and Orbax, either way.

    python -m experiments.convert_checkpoint --from=Qwen3-30B-A3B --to=out/orbax --verify

Needs no accelerator; JAX_PLATFORMS=cpu keeps JAX from taking hold of one. Parameters pass through
one at a time, the largest being a layer's stacked experts: 0.8 GB for Qwen3-30B-A3B in bfloat16,
10 GB for Qwen3-Coder-480B-A35B. To Hugging Face the host needs memory for one file (--max_shard_gb)
and one of these, to Orbax for three of these (or 3 GB if they are small). FP8 stays FP8 unless
--dequantize is given. --to is written beside its place and put there whole, so a run that is cut
off leaves what was there; it needs the space of both. Tokenizer and generation_config.json are
copied along.
"""

import contextlib
import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator

import rich.progress
from absl import logging
from rich.console import Console

from experiments.bench import script
from experiments.bench.script import flag
from moe_jax.checkpoints import (
    CheckpointError,
    Format,
    Reader,
    detect_format,
    differences,
    open_checkpoint,
    write_hugging_face,
    write_orbax,
)
from moe_jax.json_files import local_path

FORMATS = typing.get_args(Format)
DTYPES = ("bfloat16", "float32", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    source: str = flag(
        "", "The checkpoint to read, of either format.", name="from", needs="a directory"
    )
    to: str = flag("", "The directory to write.", needs="a directory")
    to_format: str | None = flag(None, "By default the one that --from is not in.", of=FORMATS)
    dtype: str | None = flag(
        None, "To convert what is not FP8 to; by default as stored.", of=DTYPES
    )
    dequantize: bool = flag(False, "Whether FP8 becomes bfloat16, or --dtype.")
    max_shard_gb: float = flag(
        5.0, "GB (1e9 bytes) of tensors in a safetensors file.", least=1e-9, most=1e9
    )
    overwrite: bool = flag(False, "Whether --to may hold a checkpoint already.")
    verify: bool = flag(
        False, "Read both checkpoints again afterwards and compare every array bit for bit."
    )

    def __post_init__(self):
        here = local_path(self.source, "--from").resolve()
        if here == local_path(self.to, "--to").resolve():
            raise ValueError(f"--to is {self.to!r}, as --from is; expected another directory")


def main(settings: Settings) -> None:
    """Converts and verifies.

    Raises:
      ValueError, NotImplementedError, OSError: it cannot be done; the message says what is wrong.
    """
    logging.set_verbosity(logging.WARNING)  # absl's default shows a page of Orbax's notes
    console = script.make_console()
    _convert(settings, console)
    if settings.verify:
        _verify(settings, console)


def _convert(settings: Settings, console: Console) -> None:
    is_from = detect_format(settings.source)
    to_format = settings.to_format or FORMATS[1 - FORMATS.index(is_from)]
    reader = _open_source(settings)
    say(
        console,
        f"{settings.source} ({is_from}): {len(reader.shapes)} arrays, {reader.nbytes / 1e9:.3f} GB",
    )
    with bytes_bar(console, f"writing {to_format}") as progress:
        shared = {
            "overwrite": settings.overwrite,
            "copy_from": settings.source,
            "progress": progress,
        }
        if to_format == "orbax":
            write_orbax(settings.to, reader, **shared)
        else:
            max_shard_bytes = round(settings.max_shard_gb * 1e9)
            write_hugging_face(settings.to, reader, max_shard_bytes=max_shard_bytes, **shared)
    say(console, f"Wrote {settings.to} ({to_format})")


def _open_source(settings: Settings) -> Reader:
    return open_checkpoint(settings.source, dtype=settings.dtype, dequantize=settings.dequantize)


def _verify(settings: Settings, console: Console) -> None:
    """Compares what --from says, converted once more, with what --to says.

    Raises:
      CheckpointError: arrays or the config differ; lists which.
    """
    expected = _open_source(settings)
    found = open_checkpoint(settings.to)
    with bytes_bar(console, "verifying") as progress:
        different, checksum = differences(expected, found, progress)
    if different:
        listed = ", ".join(different[:8]) + (", ..." if len(different) > 8 else "")
        raise CheckpointError(
            f"--verify: {settings.to} differs from {settings.source} in {len(different)}: {listed}"
        )
    say(console, f"Verified: {len(found.shapes)} arrays are equal, bit for bit")
    say(console, f"sha256 of the arrays: {checksum}")


@contextlib.contextmanager
def bytes_bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over bytes while the block runs; in a log file, one line."""
    if not console.is_terminal:
        say(console, f"... {what}")
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


def say(console: Console, line: str) -> None:
    """Prints a line as it is, however long."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


run = functools.partial(
    script.run, Settings, main, one_line=(ValueError, NotImplementedError, OSError)
)

if __name__ == "__main__":
    run()
