"""Flags become a dataclass: every type, every constraint, and one line where one is not met."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest

from experiments.bench import script
from experiments.bench.script import argument, flag

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    name: str = flag("a", "A name.", of=("a", "b"))
    names: tuple[str, ...] = flag(("a",), "Names.", of=("a", "b"))
    counts: tuple[int, ...] = flag((1, 8), "Counts.", least=1, needs="whole numbers")
    bucket: tuple[int, ...] = flag((2,), "Buckets.", of=(1, 2, 4))
    count: int = flag(3, "A count.", least=0, most=9)
    seconds: float = flag(0.0, "Seconds.", least=0)
    on: bool = flag(True, "Whether.")
    folder: pathlib.Path = flag(pathlib.Path("out"), "A folder.", needs="a folder")
    maybe: str | None = flag(None, "Perhaps.")
    maybe_count: int | None = flag(None, "Perhaps.", least=0)
    maybe_folder: pathlib.Path | None = flag(None, "Perhaps.")
    lines: tuple[str, ...] = flag((), "Lines.", repeated=True)

    def __post_init__(self):
        if self.name == "b" and not self.on:
            raise ValueError("--name is 'b' with --noon; expected --on")


def test_without_flags_there_are_the_defaults():
    assert script.parse_settings(Settings, []) == Settings()


def test_every_type_is_read():
    line = (
        "--name=b --names=b,a,b --counts=4,2,4 --bucket= --count=0 --seconds=1.5 --maybe=x "
        "--maybe_count=7 --maybe_folder=y --folder=z --lines=a,b --lines=a,b"
    )
    assert script.parse_settings(Settings, line.split()) == Settings(
        name="b",
        names=("b", "a"),
        counts=(4, 2),
        bucket=(),
        count=0,
        seconds=1.5,
        maybe="x",
        maybe_count=7,
        maybe_folder=pathlib.Path("y"),
        folder=pathlib.Path("z"),
        lines=("a,b", "a,b"),
    )
    assert script.parse_settings(Settings, ["--noon", "--maybe="]) == Settings(on=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--name=c"], "--name is 'c'; expected one of a, b"),
        (["--names=a,c"], "--names has 'c'; expected one of a, b"),
        (["--counts=1,two"], "--counts has 'two'; expected 1 to 2147483647"),
        (["--counts=0"], "--counts has 0; expected 1 to 2147483647"),
        (["--counts="], "--counts is empty; expected whole numbers"),
        (["--bucket=3"], "--bucket has 3; expected one of 1, 2, 4"),
        (["--bucket=x"], "--bucket has 'x'; expected one of 1, 2, 4"),
        (["--count=-1"], "--count is -1; expected 0 to 9"),
        (["--count=10"], "--count is 10; expected 0 to 9"),
        (["--seconds=nan"], "--seconds is nan; expected 0 to"),
        (["--folder="], "--folder is empty; expected a folder"),
        (["--maybe_count=-2"], "--maybe_count is -2; expected 0 to"),
        (["--name=b", "--noon"], "--name is 'b' with --noon; expected --on"),
        (["--count=one"], "flag --count=one"),
        (["--nosuch=1"], "Unknown command line flag 'nosuch'"),
        (["left", "over"], "takes flags only; left over: left over"),
    ],
)
def test_a_flag_that_is_not_accepted_ends_the_script_with_its_name(flags, message):
    with pytest.raises(SystemExit) as stopped:
        script.parse_settings(Settings, flags)
    assert str(stopped.value).startswith("test_script: ")
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneFile:
    path: pathlib.Path = argument("the JSONL file")
    on: bool = flag(False, "Whether.")


def test_one_argument_without_a_flag():
    assert script.parse_settings(OneFile, ["x", "--on"]) == OneFile(path=pathlib.Path("x"), on=True)
    for arguments in ([], ["x", "y"]):
        with pytest.raises(SystemExit, match="test_script: takes one argument, the JSONL file"):
            script.parse_settings(OneFile, arguments)


def test_what_main_returns_or_raises_ends_the_script():
    def failing(settings):
        raise KeyError("a fault of ours")

    script.run(Settings, lambda settings: None, [])
    script.run(Settings, lambda settings: 0, [])
    with pytest.raises(SystemExit, match="two failed"):
        script.run(Settings, lambda settings: "two failed", [])
    with pytest.raises(SystemExit, match="test_script: 'a fault of ours'"):
        script.run(Settings, failing, [], one_line=(KeyError,))
    with pytest.raises(KeyError):  # with its traceback
        script.run(Settings, failing, [], one_line=(OSError,))


def test_a_process_reads_its_own_flags_and_shows_them_in_its_help(tmp_path):
    (tmp_path / "made.py").write_text(
        '"""What it asks."""\n'
        "import dataclasses\n"
        "from experiments.bench import script\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Settings:\n"
        '    on: bool = script.flag(False, "Whether.")\n'
        "script.run(Settings, lambda settings: f'on is {settings.on}')\n"
    )

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "made", *arguments],
            env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
            capture_output=True,
            text=True,
        )

    shown = run("--help").stdout
    assert "What it asks." in shown
    assert "--[no]on: Whether." in shown
    assert run("--on").stderr == "on is True\n"
    assert run("x").stderr == "made: takes flags only; left over: x\n"


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    script.writable_folder("out", tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"--out is '.*file'; expected a folder to write to: "):
        script.writable_folder("out", file)


def test_fields_are_read_from_texts():
    changed = script.with_texts(Settings(), {"on": "false", "count": "3", "maybe": "", "name": "a"})
    assert changed == Settings(on=False, count=3, maybe=None, name="a")
    for texts, message in (
        ({"on": "no"}, "--on is 'no'; expected true or false"),
        ({"count": "10"}, "--count is 10; expected 0 to 9"),
        ({"name": "b", "on": "false"}, "--name is 'b' with --noon; expected --on"),
    ):
        with pytest.raises(ValueError, match=message):
            script.with_texts(Settings(), texts)
