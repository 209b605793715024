"""What a run shows and leaves behind: the progress bar, the JSONL, the table and the picture."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import rich.progress
from rich.console import Console

from experiments.compare import plot, records, report


class Progress:
    """A progress bar of several stages; lines that are said go above it."""

    def __init__(self, bar: rich.progress.Progress):
        self._bar = bar
        self._task = None

    def start(self, stage: str, total: int) -> None:
        """Begins a stage of `total` steps."""
        if self._task is not None:
            self._bar.update(self._task, visible=False)
        self._task = self._bar.add_task(stage, total=total)
        self._begun = 0

    def advance(self, what: str) -> None:
        """Says what runs next; the step before it is done."""
        self._bar.update(self._task, completed=self._begun, description=what)
        self._begun += 1
        if not self._bar.console.is_terminal:  # in a log file, a line each instead of a bar
            self._bar.console.print(f"... {what}", highlight=False)

    def say(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, markup=False)


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """A bar while the block runs."""
    columns = (
        rich.progress.TextColumn("{task.description:<34}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
    )
    with rich.progress.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        yield Progress(bar)


def saver(
    path: pathlib.Path, environment: records.Environment
) -> Callable[[list[records.Measurement]], None]:
    """save(measurements), to be called often: a run that is cut off keeps what it had."""
    return lambda measurements: records.write(path, environment, measurements)


def finish(
    console: Console,
    path: pathlib.Path,
    environment: records.Environment,
    measurements: list[records.Measurement],
) -> int:
    """Prints the table, draws the picture beside the JSONL; returns how many failed."""
    report.print_table(console, environment, measurements)
    picture = path.with_suffix(".png")
    plot.draw(picture, environment, measurements)
    console.print(f"Wrote {path} and {picture}", highlight=False, soft_wrap=True)
    return sum(bool(m.error) for m in measurements)
