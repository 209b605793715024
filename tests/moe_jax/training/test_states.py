"""A run's states: bits, what is kept, what a run may go on with, and states that are not whole."""

import dataclasses
import logging
import os
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoints import CheckpointError, load_orbax
from moe_jax.parameters import to_arrays
from moe_jax.training import OptimizerOptions, TrainOptions, init_state
from moe_jax.training.same_run import describe_run, expect_same
from moe_jax.training.states import TrainingStates
from tests.moe_jax.tiny import TINY, random_arrays

# After a file that cannot be read Orbax leaves futures and coroutines, of which Python complains
# when they go, maybe in a later test or at the end of the process.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

CONFIG = dataclasses.replace(TINY, num_hidden_layers=1, extra={})
OPTIONS = TrainOptions(
    config=CONFIG, optimizer=OptimizerOptions(total_steps=9, warmup_steps=2, learning_rate=0.5)
)
DATA = {"seed": 0, "texts": "abc", "micro_batches": 1}

add_one = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)


def opened(folder, options=OPTIONS, data=DATA, **keywords) -> TrainingStates:
    return TrainingStates(folder, options=options, data=data, **keywords)


def copy_of(tree):
    return jax.tree.map(lambda a: np.array(a, copy=True), tree)


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def target():
    return jax.eval_shape(lambda: init_state(random_arrays(CONFIG), OPTIONS.optimizer))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder of the states of 5 steps, each donated as soon as it is being saved; and copies."""
    folder, copies = tmp_path_factory.mktemp("run") / "states", {}
    state = init_state(random_arrays(CONFIG), OPTIONS.optimizer)
    with opened(folder) as states:
        for step, loss in enumerate((4.0, 2.0, 3.0, 5.0, 4.5), start=1):
            state = add_one(state)
            copies[step] = copy_of(state)
            states.save(state, held_out_loss=loss)
    return folder, copies


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run[0], tmp_path / "states")


def restored(folder, target, **keywords):
    with opened(folder, **keywords) as states:
        return states.restore(target)


def test_the_last_ones_and_the_best_are_kept_in_bits(run, target):
    folder, copies = run
    assert sorted(os.listdir(folder)) == ["2", "4", "5"]
    found = restored(folder, target)
    assert found.notes == []
    assert_same_bits(found.state, copies[5])


def test_a_state_is_a_checkpoint_of_its_parameters(run):
    model = load_orbax(run[0] / "2")
    assert model.config == CONFIG
    assert_same_bits(to_arrays(model), run[1][2].params)


def test_an_empty_folder_has_no_state(tmp_path, target):
    assert restored(tmp_path / "deep" / "states", target) is None


def test_one_run_at_a_time(copied):
    states = opened(copied)
    with pytest.raises(CheckpointError, match="is held by another run that is under way"):
        opened(copied)
    states.close()
    opened(copied).close()


def test_anew(copied, target):
    with opened(copied, anew=True) as states:
        assert states.restore(target) is None
        assert os.listdir(copied) == []


def test_keep(copied, run):
    with pytest.raises(ValueError, match="keep is 0; expected at least 1"):
        opened(copied, keep=0)
    with opened(copied, keep=1) as states:
        states.save(add_one(on_device(run[1][5])), held_out_loss=1.0)
        states.wait()
        assert states.steps == [6]  # the last one is the best one


def changed(options=OPTIONS, optimizer=None, **fields) -> TrainOptions:
    optimizer = dataclasses.replace(options.optimizer, **(optimizer or {}))
    return dataclasses.replace(options, optimizer=optimizer, **fields)


@pytest.mark.parametrize(
    ("options", "data", "said"),
    [
        (changed(optimizer={"learning_rate": 1}), {}, "optimizer.learning_rate was 0.5 and is 1"),
        (changed(balance="per_layer"), {}, "step.balance was 'pooled' and is 'per_layer'"),
        (changed(compute_dtype="float32"), {}, "step.compute_dtype was 'bfloat16' and is 'fl"),
        (
            changed(config=dataclasses.replace(CONFIG, router_aux_loss_coef=2.0)),
            {},
            "config.router_aux_loss_coef was 0.001 and is 2.0",
        ),
        (OPTIONS, {"seed": 1}, "data.seed was 0 and is 1"),
        (OPTIONS, {"texts": "abd"}, "data.texts was 'abc' and is 'abd'"),
        (OPTIONS, {"more": 1}, "data.more was None and is 1"),
        (changed(optimizer={"total_steps": 4}), {}, "total_steps is 4; expected at least 5"),
    ],
)
def test_another_run_is_refused_by_name(options, data, said, tmp_path):
    before = describe_run(OPTIONS, DATA)
    with pytest.raises(CheckpointError, match=f"{said}"):
        expect_same(tmp_path, before, describe_run(options, DATA | data), 5)


def test_all_that_is_refused_is_listed(run, target):
    options = changed(optimizer={"b1": 0.5}, balance="per_layer")
    with pytest.raises(CheckpointError, match=f"{run[0]} is of a run with other options") as caught:
        restored(run[0], target, options=options, data=DATA | {"seed": 3})
    assert [line.partition(" ")[0] for _, line in caught.value.problems] == [
        "data.seed", "optimizer.b1", "step.balance",
    ]  # fmt: skip


def test_more_steps_and_other_ways_to_compute_them_are_allowed(run, target):
    options = changed(optimizer={"total_steps": 20}, remat=True)
    found = restored(run[0], target, options=options, data=DATA | {"micro_batches": 4})
    assert_same_bits(found.state, run[1][5])
    assert found.notes == [
        "data.micro_batches was 1 and is 4: bits may differ by rounding",
        "optimizer.total_steps was 9 and is 20: the learning rate falls over as many steps from "
        "here on",
        "step.remat was False and is True: bits may differ by rounding",
    ]
    constant = describe_run(changed(optimizer={"schedule": "constant"}), DATA)
    [line] = expect_same(run[0], constant, constant | {"optimizer.total_steps": 20}, 9)
    assert line == "optimizer.total_steps was 9 and is 20"


@pytest.mark.parametrize(
    "pattern",
    [
        "_CHECKPOINT_METADATA",
        "metrics/metrics",
        "state/manifest.ocdbt",
        "training/d/*",
        pytest.param("**/*", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_state_is_passed_over(copied, run, target, pattern):
    """A file of the last state cut off: that state in all its bits, or the one before it."""
    passed_over = 0
    for file in [path for path in (copied / "5").glob(pattern) if path.is_file()]:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with opened(copied) as states:
            found = states.restore(target)
            step = int(found.state.step)
            assert_same_bits(found.state, run[1][step])
            if step == 5:
                assert pattern == "**/*"
                assert found.notes == []
                file.write_bytes(content)
                continue
            passed_over += 1
            assert step == 4
            [note] = found.notes
            assert note.startswith(f"{copied / '5'} is not whole: ")
            assert note.endswith("; it is 5.damaged now")
            assert states.steps == [2, 4]
        (copied / "5.damaged").rename(copied / "5")
        file.write_bytes(content)
    assert passed_over >= (8 if pattern == "**/*" else 1)


def test_a_step_is_saved_again_after_its_damaged_state(copied, run, target):
    (copied / "5.damaged").mkdir()  # of another time
    (copied / "5" / "_CHECKPOINT_METADATA").write_text("")
    with opened(copied) as states:
        assert_same_bits(states.restore(target).state, run[1][4])
        states.save(on_device(run[1][5]), held_out_loss=1.0)
    assert sorted(os.listdir(copied)) == ["4", "5", "5.damaged", "5.damaged1"]
    assert_same_bits(restored(copied, target).state, run[1][5])


def test_no_state_is_whole(copied, target):
    for step in (2, 4, 5):
        shutil.rmtree(copied / str(step) / "state" / "d")
    with pytest.raises(CheckpointError, match=r"has no whole state: .*5 is not whole: .*2 is not"):
        restored(copied, target)
    assert sorted(os.listdir(copied)) == ["2", "4", "5"]


def test_a_deletion_that_was_cut_off_is_finished(copied, target):
    (copied / "4" / "_CHECKPOINT_METADATA").unlink()
    assert restored(copied, target).notes == []
    assert sorted(os.listdir(copied)) == ["2", "5"]


def test_a_later_version(copied, target):
    path = copied / "5" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(CheckpointError, match="5 has schema_version 2; expected at most 1: a late"):
        restored(copied, target)


def test_a_state_is_on_the_disk_when_the_next_is_begun(copied, run, monkeypatch):
    """Or a power cut could leave none, because the next one removes those before it."""
    synced, fsync = set(), os.fsync

    def recording(handle):
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    with opened(copied) as states:
        states.save(add_one(on_device(run[1][5])))
        monkeypatch.setattr(os, "fsync", recording)
        states.wait()
        paths = [copied, copied / "6", *(copied / "6").rglob("*")]
        assert len(paths) > 10
        assert {path for path in paths if path.stat().st_ino not in synced} == set()


def test_full_disk(copied, run, target):
    """No file may grow beyond 6000 bytes: the system itself refuses the write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    sixth = add_one(on_device(run[1][5]))
    with opened(copied, keep=1) as states:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
        try:
            with pytest.raises(
                CheckpointError,
                match=r"the state of step 6 cannot be saved in .*; of the whole ones step 5 is "
                r"kept\. Orbax says: .*File too large",
            ):
                states.save(sixth, held_out_loss=0.0)
                for _ in range(1000):
                    states.check()
                    time.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        # A thread of the failed save may have written a file since.
        assert sorted(n for n in os.listdir(copied) if "tmp" not in n) == ["2", "4", "5"]
        states.save(sixth, held_out_loss=0.0)
    assert_same_bits(restored(copied, target).state, sixth)
    assert not list(copied.glob("*tmp*"))
