"""What every script begins with: flags as a frozen dataclass, a console, a progress bar.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Settings:
        preset: str = flag("tiny", "The layer.", of=SHAPES)
        tokens: tuple[int, ...] = flag((1, 8), "Tokens in the batch.", least=1)

    def main(settings: Settings) -> None: ...

    run = functools.partial(script.run, Settings, main)

    if __name__ == "__main__":
        run()

A class's flags are defined when the script runs, so a test or a notebook may import any script.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import rich.progress
from absl import app, flags
from rich.console import Console

flags.disclaim_key_flags()  # --help shows a script's flags as the script's own

_LARGEST = 2**31 - 1
_BOOLS = {"true": True, "false": False, True: True, False: False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Flag:
    """What `flag` was told; see there."""

    help: str
    of: Collection | None
    least: float | None
    most: float
    needs: str
    name: str
    repeated: bool
    positional: bool


def flag(
    default: Any,
    help: str,
    *,
    of: Collection | None = None,
    least: float | None = None,
    most: float = _LARGEST,
    needs: str = "",
    name: str = "",
    repeated: bool = False,
) -> Any:
    """A dataclass field that is a flag, by default of the field's name.

    The field's annotation says how the text is read: bool, int, float, str, pathlib.Path, one of
    these `| None` (an empty text is None), or tuple[one of these, ...] (a list with commas, without
    its duplicates).

    Args:
      default: the value where the flag is not given.
      help: a sentence about the value.
      of: accepted values, of each element where the field is a tuple.
      least, most: the range of a number, or of each element.
      needs: what is expected where the value is empty; an empty value is accepted without it.
      name: the flag's, where Python has another use for the word.
      repeated: a tuple's flag is given once for each element, which may have commas in it.
    """
    made = _Flag(
        help=help,
        of=of,
        least=least,
        most=most,
        needs=needs,
        name=name,
        repeated=repeated,
        positional=False,
    )
    return dataclasses.field(default=default, metadata={"flag": made})


def argument(help: str) -> Any:
    """A dataclass field that is the script's one argument without a flag."""
    made = _Flag(
        help=help,
        of=None,
        least=None,
        most=_LARGEST,
        needs=help,
        name="",
        repeated=False,
        positional=True,
    )
    return dataclasses.field(metadata={"flag": made})


def run(
    settings_class: type,
    main: Callable[[Any], int | str | None],
    argv: Sequence[str] | None = None,
    *,
    one_line: tuple[type[Exception], ...] = (),
) -> None:
    """Reads the flags and calls main(settings); what it returns goes to sys.exit, unless None or 0.

    Args:
      settings_class: a frozen dataclass whose fields are made by `flag` and `argument`.
      main: the script.
      argv: what follows the script's name; None takes the process's own.
      one_line: errors of `main` that end the script with their message alone.

    Raises:
      SystemExit: a flag is not accepted, or `main` failed; the script's name comes first.
    """
    module = getattr(main, "__module__", None) or settings_class.__module__
    if module == "__main__":
        module = sys.modules["__main__"].__spec__.name
    name = module.rpartition(".")[2]

    def read_and_run(values: flags.FlagValues, left: Sequence[str]) -> None:
        try:
            settings = _settings(settings_class, values, left)
        except ValueError as error:
            sys.exit(f"{name}: {error}")
        try:
            status = main(settings)
        except one_line as error:
            sys.exit(f"{name}: {error}")
        if status:
            sys.exit(status)

    if argv is not None:
        values = flags.FlagValues()
        _define(settings_class, values)
        try:
            left = values([name, *argv])[1:]
        except flags.Error as error:
            sys.exit(f"{name}: {error}")
        read_and_run(values, left)
        return
    # JAX takes three quarters of a GPU's memory by default, and the largest layers need more. This
    # is read when the first device is asked for.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    sys.stdout.reconfigure(line_buffering=True)  # a run that is cut off leaves its lines
    _define(settings_class, flags.FLAGS)
    app.run(lambda left: read_and_run(flags.FLAGS, left[1:]))


def parse_settings(settings_class: type, argv: Sequence[str]) -> Any:
    """The settings that this command line gives.

    Raises:
      SystemExit: a flag is not accepted.
    """
    found = []
    run(settings_class, found.append, argv)
    return found[0]


def with_texts(settings: Any, texts: Mapping[str, str]) -> Any:
    """The settings with other values of fields, none a tuple, read and checked as flags are.

    Raises:
      ValueError: names the flag, its value and what is accepted.
    """
    hints = typing.get_type_hints(type(settings))
    made = {field.name: field.metadata["flag"] for field in dataclasses.fields(settings)}
    found = {name: _read(name, hints[name], made[name], text) for name, text in texts.items()}
    return dataclasses.replace(settings, **found)


def _define(settings_class: type, values: flags.FlagValues) -> None:
    """Defines the class's flags."""
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        made = field.metadata["flag"]
        if made.positional:
            continue
        kind, is_tuple = _kind(hints[field.name])
        default = field.default
        if is_tuple:
            default = [str(value) for value in default]
        elif default is not None and kind is pathlib.Path:
            default = str(default)
        which = {bool: "bool", int: "integer", float: "float"}.get(kind, "string")
        if is_tuple:
            which = "multi_string" if made.repeated else "list"
        define = getattr(flags, f"DEFINE_{which}")
        define(made.name or field.name, default, _help(made), flag_values=values)


def _help(made: _Flag) -> str:
    return made.help if made.of is None else f"{made.help} One of {_listed(made.of)}."


def _kind(hint: Any) -> tuple[type, bool]:
    """The type of a field, or of a tuple's elements; and whether it is a tuple."""
    if isinstance(hint, types.UnionType):
        hint = next(each for each in typing.get_args(hint) if each is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _settings(settings_class: type, values: flags.FlagValues, left: Sequence[str]) -> Any:
    """The dataclass of these values.

    Raises:
      ValueError: names the flag, its value and what is accepted.
    """
    hints = typing.get_type_hints(settings_class)
    fields = dataclasses.fields(settings_class)
    found = {}
    positional = [field for field in fields if field.metadata["flag"].positional]
    if positional:
        [field] = positional
        if len(left) != 1:
            raise ValueError(f"takes one argument, {field.metadata['flag'].help}")
        found[field.name] = _kind(hints[field.name])[0](left[0])
    elif left:
        raise ValueError(f"takes flags only; left over: {' '.join(left)}")
    for field in fields:
        if field.name in found:
            continue
        made = field.metadata["flag"]
        name = made.name or field.name
        found[field.name] = _read(name, hints[field.name], made, values[name].value)
    return settings_class(**found)


def _read(name: str, hint: Any, made: _Flag, value: Any) -> Any:
    """A flag's value as its field has it."""
    kind, is_tuple = _kind(hint)
    if made.needs and value in ("", []):
        raise ValueError(f"--{name} is empty; expected {made.needs}")
    if isinstance(hint, types.UnionType) and value in (None, ""):
        return None
    if is_tuple:
        elements = [_checked(name, "has", text, kind, made) for text in value]
        return tuple(elements if made.repeated else dict.fromkeys(elements))
    return _checked(name, "is", value, kind, made)


def _checked(name: str, verb: str, value: Any, kind: type, made: _Flag) -> Any:
    """The value, or one element of it, as `kind`."""
    if kind is int and isinstance(value, str):
        if not value.strip().lstrip("-").isdecimal():
            raise ValueError(f"--{name} {verb} {value!r}; expected {_numbers(made)}")
        value = int(value)
    if kind is bool and value not in _BOOLS:
        raise ValueError(f"--{name} {verb} {value!r}; expected true or false")
    read = {bool: _BOOLS.get, pathlib.Path: lambda text: pathlib.Path(text).expanduser()}
    value = read.get(kind, kind)(value)
    if made.of is not None and value not in made.of:
        raise ValueError(f"--{name} {verb} {value!r}; expected one of {_listed(made.of)}")
    if kind in (int, float) and made.least is not None and not made.least <= value <= made.most:
        raise ValueError(f"--{name} {verb} {value}; expected {_numbers(made)}")
    return value


def _numbers(made: _Flag) -> str:
    if made.of is not None:
        return f"one of {_listed(made.of)}"
    return f"{made.least} to {made.most}" if made.least is not None else "a whole number"


def _listed(accepted: Collection) -> str:
    return ", ".join(map(str, accepted))


def writable_folder(name: str, path: pathlib.Path) -> None:
    """Makes the folder that --name gives.

    Raises:
      ValueError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("it is read-only")
    except OSError as error:
        raise ValueError(
            f"--{name} is {str(path)!r}; expected a folder to write to: {error}"
        ) from None


def make_interpreter_safe() -> None:
    """Turns off what Pallas's interpreter can hang under; to be called before the CPU is used."""
    import jax  # which takes a second, and --help does without it

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def make_console(width: int = 120) -> Console:
    """A console; a pipe or a log file is `width` wide, because it has no width of its own."""
    return Console() if sys.stdout.isatty() else Console(width=width)


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
        self.report(self._begun, what)
        self._begun += 1

    def report(self, done: int, what: str = "") -> None:
        """Says how many steps are done, and what was found where there is something to say."""
        self._bar.update(self._task, completed=done, **({"description": what} if what else {}))
        if what and not self._bar.console.is_terminal:  # in a log file, a line instead of a bar
            self._bar.console.print(f"... {what}", highlight=False)

    def say(self, line: str) -> None:
        """Prints a line."""
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
