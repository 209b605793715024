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

STEPS, SAVE_EVERY = 3, 1  # as in test_train, so that what is compiled serves both


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
    """A run that ended in step 3, when two states were saved."""
    out = text.parent / "stopped"
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        fail_at(monkeypatch, 3)
        train.run(flags(out))
    assert sorted(os.listdir(out / "states")) == ["1", "2"]
    return out


def printed(capsys) -> str:
    """On one line, because the console breaks lines."""
    return " ".join(capsys.readouterr().out.split())


def test_the_rows(whole):
    found = [(row["kind"], row["step"]) for row in rows_of(whole)]
    step, saved = "step", "saved"
    expected = [(step, 1), (saved, 1), (step, 2), (saved, 2), (step, 3), (saved, 3)]
    assert found == [*expected, ("held_out", 3)]


def test_killed_while_a_state_was_written(whole, flags, tmp_path, capsys):
    """SIGKILL between the last file of a state and its rename."""
    command = [sys.executable, "-m", killed_training.__name__, "commit", "2", *flags(tmp_path)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(os.listdir(tmp_path / "states")) == ["1", "2.orbax-checkpoint-tmp"]
    train.run(flags(tmp_path))
    assert "going on from step 1 of 3" in printed(capsys)
    assert differences(tmp_path, whole) == []


def test_two_parts_are_the_whole_in_bits(stopped, whole, flags, tmp_path, capsys):
    """A full disk between them loses nothing: no file may grow beyond 20 kB, a state has to."""
    out = shutil.copytree(stopped, tmp_path / "stopped")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
    try:
        with pytest.raises(
            SystemExit,
            match=r"^train: the state of step 3 cannot be saved in .*; of the whole ones step 2 is "
            r"kept\. Orbax says: .*File too large",
        ):
            train.run(flags(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(out / "states")) == ["1", "2"]
    train.run(flags(out))
    assert printed(capsys).count("going on from step 2 of 3 in ") == 2
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
    fail_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        train.run([*flags(out), "--steps=9", "--warmup_steps=2"])
    assert "optimizer.total_steps was 3 and is 9: the learning rate" in printed(capsys)


def test_beginning_anew(stopped, flags, tmp_path, monkeypatch):
    out = shutil.copytree(stopped, tmp_path / "stopped")
    fail_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        train.run([*flags(out), "--noresume"])
    assert os.listdir(out / "states") == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--learning_rate=1"], "optimizer.learning_rate was 0.01 and is 1.0"),
        (["--layers=2"], "config.num_hidden_layers was 1 and is 2"),
        (["--seed=1"], "data.seed was 0 and is 1"),
        (["--batch=3"], "data.rows_of_a_step was 4 and is 6"),
        (["--steps=1"], "total_steps is 1; expected at least 2, which the run in"),
    ],
)
def test_another_run_is_refused_by_name(stopped, flags, changed, said):
    with pytest.raises(SystemExit, match=said):
        train.run([*flags(stopped), *changed])
    assert sorted(os.listdir(stopped / "states")) == ["1", "2"]


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
