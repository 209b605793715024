"""A save that fails or is killed at any point leaves what was there, and the next one cleans up."""

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys

import pytest

from moe_jax.checkpoints import CheckpointError, differences, open_checkpoint, replace_directory
from moe_jax.checkpoints.replace_directory import replacing
from tests.moe_jax.checkpoints import hub, killed_saves


@pytest.mark.parametrize(
    "cases",  # format -> stride, and more outcomes than this
    [
        {"hugging_face": (31, 20), "orbax": (150, 3)},
        pytest.param({"hugging_face": (1, 700)}, marks=pytest.mark.slow),
        pytest.param({"orbax": (7, 40)}, marks=pytest.mark.slow),
    ],
    ids=["both", "hugging_face", "orbax"],
)
def test_killed_saves(tmp_path, cases):
    """SIGKILL at every stride-th line that a save executes: the old checkpoint, or the new one."""
    asked = [f"{form}:{stride}" for form, (stride, _) in cases.items()]
    command = [sys.executable, "-m", killed_saves.__name__, str(tmp_path), *asked]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert results.keys() == cases.keys()
    for form, result in results.items():
        outcomes = result["outcomes"]
        assert result["code"] == 0  # the last one got through
        assert len(outcomes) > cases[form][1]
        assert outcomes == sorted(outcomes, key=lambda number: -1 if number is None else number)
        assert set(outcomes) == {0, 1}
        assert result["left"] == ["saved"]
        assert result["leftovers"] > len(outcomes) / 2  # they were really cut off


def holds(directory, number) -> bool:
    return not differences(killed_saves.reader(number), open_checkpoint(directory))[0]


def raising_at(line: int):
    """A trace function that raises an OSError at the line-th line of the code that saves."""
    left = line

    def trace(frame, event, argument):
        nonlocal left
        if not frame.f_code.co_filename.endswith(killed_saves.TRACED):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise OSError(errno.ENOSPC, "no space left on device")
        return trace

    return trace


def test_saves_that_fail_at_any_line(tmp_path):
    saved = tmp_path / "saved"
    killed_saves.save(saved, "hugging_face", 0)
    (saved / "tokenizer.json").write_text("{}")
    before = hub.bytes_of(saved)
    outcomes, leftovers, line = [], 0, 0
    while True:
        line += 7
        previous = sys.gettrace()
        sys.settrace(raising_at(line))
        try:
            killed_saves.save(saved, "hugging_face", 1)
        except (OSError, CheckpointError) as error:
            assert "no space left on device" in str(error)
            failed = True
        else:
            failed = False
        finally:
            sys.settrace(previous)
        if hub.bytes_of(saved) == before:
            outcomes.append(0)
            assert failed
            leftovers += len(os.listdir(tmp_path)) - 1
        else:
            assert holds(saved, 1)
            assert (saved / "tokenizer.json").read_text() == "{}"
            outcomes.append(1)
            if not failed:
                break
            killed_saves.save(saved, "hugging_face", 0)
    assert len(outcomes) > 50
    assert outcomes.count(0) > 40
    assert leftovers <= 2  # only where the very line that clears up failed
    assert os.listdir(tmp_path) == ["saved"]


@pytest.mark.parametrize("form", ["hugging_face", "orbax"])
def test_full_disk(tmp_path, form):
    """No file may grow beyond 600 bytes: the system itself refuses the write."""
    saved = tmp_path / "saved"
    killed_saves.save(saved, form, 0)
    before = hub.bytes_of(saved)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        with pytest.raises(Exception, match="File too large"):
            killed_saves.save(saved, form, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert hub.bytes_of(saved) == before
    assert os.listdir(tmp_path) == ["saved"]


def fill(new) -> None:
    (new / "config.json").write_text("new")


def test_a_new_name_needs_no_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(replace_directory, "_exchange", None)
    with replacing(tmp_path / "deep" / "er", overwrite=False) as new:
        assert not (tmp_path / "deep" / "er").exists()
        fill(new)
    assert hub.bytes_of(tmp_path) == {"deep/er/config.json": b"new"}


def test_where_directories_cannot_be_exchanged(tmp_path, monkeypatch):
    def refuse(one, other):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(replace_directory, "_exchange", refuse)
    saved = tmp_path / "saved"
    saved.mkdir()
    fill(saved)
    begun = False
    with (
        pytest.raises(CheckpointError, match=r"cannot be exchanged there .*Invalid argument"),
        replacing(saved, overwrite=True),
    ):
        begun = True
    assert not begun
    assert hub.bytes_of(tmp_path) == {"saved/config.json": b"new"}


@pytest.mark.parametrize("form", ["hugging_face", "orbax"])
def test_all_is_on_disk_before_the_exchange(tmp_path, monkeypatch, form):
    """Or the power could go off between a rename that is on disk and data that is not."""
    saved = tmp_path / "saved"
    killed_saves.save(saved, form, 0)
    (saved / "tokenizer.json").write_text("{}")
    synced, exchanged = set(), []
    fsync, exchange = os.fsync, replace_directory._exchange

    def recording(handle):
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def checking(one, other):
        if other == saved:
            paths = [one, *one.rglob("*")]
            assert {path.name for path in paths if path.stat().st_ino not in synced} == set()
            exchanged.append(len(paths))
            synced.clear()
        exchange(one, other)

    monkeypatch.setattr(os, "fsync", recording)
    monkeypatch.setattr(replace_directory, "_exchange", checking)
    killed_saves.save(saved, form, 1)
    assert len(exchanged) == 1
    assert exchanged[0] > 5
    assert tmp_path.stat().st_ino in synced


def test_exchange_says_what_the_system_says(tmp_path):
    (tmp_path / "one").mkdir()
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*one.*other"):
        replace_directory._exchange(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "_CHECKPOINT_METADATA"])
def test_a_checkpoint_is_not_replaced_unasked(tmp_path, name):
    (tmp_path / name).write_text("old")
    with (
        pytest.raises(CheckpointError, match=f"holds a checkpoint already .{name}.; pass overwrit"),
        replacing(tmp_path, overwrite=False),
    ):
        pass
    assert hub.bytes_of(tmp_path) == {name: b"old"}


def test_files_and_mount_points_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path, message in ((tmp_path / "file", "is a file"), ("/proc", "is a mount point")):
        with pytest.raises(CheckpointError, match=message), replacing(path, overwrite=True):
            pass


def test_a_link_keeps_pointing_at_the_directory(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with replacing(tmp_path / "link", overwrite=False) as new:
        fill(new)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").read_text() == "new"


def test_mode_of_the_directory_is_kept(tmp_path):
    saved = tmp_path / "saved"
    saved.mkdir(mode=0o750)
    with replacing(saved, overwrite=False) as new:
        fill(new)
    assert saved.stat().st_mode & 0o777 == 0o750


def test_what_another_format_left_goes_too(tmp_path):
    saved = tmp_path / "saved"
    killed_saves.save(saved, "orbax", 0)
    killed_saves.save(saved, "hugging_face", 1)
    assert "model.safetensors.index.json" in os.listdir(saved)
    assert not {"_CHECKPOINT_METADATA", "state", "orbax.checkpoint"} & set(os.listdir(saved))
    killed_saves.save(saved, "orbax", 0)
    assert not any(name.endswith((".safetensors", ".json")) for name in os.listdir(saved))
    assert holds(saved, 0)


def test_a_folder_named_state_is_orbaxs_only_beside_its_other_files(tmp_path):
    saved = tmp_path / "saved"
    (saved / "state").mkdir(parents=True)
    (saved / "state" / "mine").write_text("x")
    with replacing(saved, overwrite=False) as new:
        fill(new)
    assert hub.bytes_of(saved) == {"config.json": b"new", "state/mine": b"x"}
    (saved / "_CHECKPOINT_METADATA").write_text("{}")
    with replacing(saved, overwrite=True) as new:
        fill(new)
    assert hub.bytes_of(saved) == {"config.json": b"new"}


def test_a_save_under_way_is_not_taken_for_a_leftover(tmp_path):
    """Brackets in the name, too, would be a pattern to glob."""
    saved = tmp_path / "run[1]"
    dead, alive = (tmp_path / f".run[1].saving-{kind}" for kind in ("dead", "alive"))
    other = tmp_path / ".run1.saving-other"  # of another directory
    for holder in (dead, alive, other):
        holder.mkdir()
        (holder / "file").write_text("x")
    handle = os.open(alive, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with replacing(saved, overwrite=False) as new:
            fill(new)
        assert sorted(os.listdir(tmp_path)) == [".run1.saving-other", alive.name, "run[1]"]
    finally:
        os.close(handle)
    with replacing(saved, overwrite=True) as new:
        fill(new)
    assert sorted(os.listdir(tmp_path)) == [".run1.saving-other", "run[1]"]
