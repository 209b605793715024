"""A run that is cut off and goes on ends in the bits of one that was not; what is refused."""

import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest

from experiments import train
from experiments.bench import training_run
from tests.experiments import killed_training
from tests.experiments.killed_training import differences, rows_of

STEPS, SAVE_EVERY = 6, 2


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return killed_training.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def flags(text):
    """The run's, of an --out."""
    return lambda out: killed_training.flags(text, out, steps=STEPS, save_every=SAVE_EVERY)


@pytest.fixture(scope="module")
def whole(text, flags):
    """A run that nothing disturbed."""
    train.run(flags(text.parent / "whole"))
    return text.parent / "whole"


def fail_at(monkeypatch, step: int) -> None:
    """The step raises KeyboardInterrupt, as Ctrl-C does."""
    compiled = training_run._compiled_step

    def interrupted(state, batch, options):
        if int(state.step) == step - 1:
            raise KeyboardInterrupt
        return compiled(state, batch, options=options)

    monkeypatch.setattr(training_run, "_compiled_step", interrupted)


@pytest.fixture(scope="module")
def stopped(text, flags):
    """A run that ended in step 6, which is after the save of step 4."""
    out = text.parent / "stopped"
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        fail_at(monkeypatch, 6)
        train.run(flags(out))
    assert sorted(os.listdir(out / "states")) == ["2", "4"]
    return out


def printed(capsys) -> str:
    """On one line, because the console breaks lines."""
    return " ".join(capsys.readouterr().out.split())


def test_the_rows(whole):
    found = [(row["kind"], row["step"]) for row in rows_of(whole)]
    step, saved = "step", "saved"
    expected = [(step, 1), (saved, 2), (step, 3), (saved, 4), (step, 6), (saved, 6)]
    assert found == [*expected, ("held_out", 6)]


def test_two_parts_are_the_whole_in_bits(stopped, whole, flags, tmp_path, capsys):
    out = shutil.copytree(stopped, tmp_path / "stopped")
    train.run(flags(out))
    assert "going on from step 4 of 6 in " in printed(capsys)
    assert differences(out, whole) == []


def test_killed_while_a_state_was_written(whole, flags, tmp_path, capsys):
    """SIGKILL between the last file of a state and its rename."""
    command = [sys.executable, "-m", killed_training.__name__, "commit", "4", *flags(tmp_path)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(os.listdir(tmp_path / "states")) == ["2", "4.orbax-checkpoint-tmp"]
    train.run(flags(tmp_path))
    assert "going on from step 2 of 6" in printed(capsys)
    assert differences(tmp_path, whole) == []


def test_a_full_disk_loses_nothing(stopped, whole, flags, tmp_path):
    """No file may grow beyond 20 kB: the system itself refuses to write the state."""
    out = shutil.copytree(stopped, tmp_path / "stopped")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
    try:
        with pytest.raises(
            SystemExit,
            match=r"^train: the state of step 6 cannot be saved in .*; "
            r"of the whole ones step 4 is kept\. Orbax says: .*File too large",
        ):
            train.run(flags(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(out / "states")) == ["2", "4"]
    train.run(flags(out))
    assert differences(out, whole) == []


def test_a_run_that_is_done(whole, flags, tmp_path, monkeypatch, capsys):
    """Nothing is trained; what it wrote at its end is written again."""
    out = shutil.copytree(whole, tmp_path / "whole")
    shutil.rmtree(out / "checkpoint")
    monkeypatch.setattr(training_run, "_compiled_step", None)
    train.run(flags(out))
    assert "nothing is left to train; --noresume begins anew" in printed(capsys)
    assert differences(out, whole) == []


def test_more_steps(whole, flags, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(whole, tmp_path / "whole")
    fail_at(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        train.run([*flags(out), "--steps=9", "--warmup_steps=5"])
    assert "optimizer.total_steps was 6 and is 9: the learning rate" in printed(capsys)


def test_beginning_anew(stopped, flags, tmp_path, monkeypatch):
    out = shutil.copytree(stopped, tmp_path / "stopped")
    fail_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        train.run([*flags(out), "--noresume"])
    assert os.listdir(out / "states") == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--learning_rate=1"], "optimizer.learning_rate was 0.004 and is 1.0"),
        (["--layers=2"], "config.num_hidden_layers was 1 and is 2"),
        (["--seed=1"], "data.seed was 0 and is 1"),
        (["--batch=3"], "data.rows_of_a_step was 4 and is 3"),
        (["--steps=3"], "total_steps is 3; expected at least 4, which the run in"),
    ],
)
def test_another_run_is_refused_by_name(stopped, flags, changed, said):
    with pytest.raises(SystemExit, match=said):
        train.run([*flags(stopped), *changed])
    assert sorted(os.listdir(stopped / "states")) == ["2", "4"]


def test_another_text_is_refused_by_name(stopped, flags, text):
    file = text / "part_0.py"
    content = file.read_text()
    file.write_text(content.replace("return", "RETURN"))
    try:
        with pytest.raises(SystemExit, match=r"data\.texts was '[0-9a-f]+' and is '[0-9a-f]+'"):
            train.run(flags(stopped))
    finally:
        file.write_text(content)


@pytest.mark.slow
def test_thirty_kills(tmp_path):
    killed_training.main(tmp_path, kills=30, seed=0)
