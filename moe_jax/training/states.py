"""The states of a run in a folder: saved while it trains on, and found again whatever ended it.

    with TrainingStates(folder, options=options, data={"seed": 0}, keep=2) as states:
        found = states.restore(jax.eval_shape(lambda: init_state(params, options.optimizer)))
        state = init_state(params, options.optimizer) if found is None else found.state
        ...
        states.save(state, held_out_loss=loss)

    FOLDER/120/     one step, by Orbax's training Checkpointer
        state/      the parameters, as moe_jax.checkpoints.load_orbax reads them from FOLDER/120
        training/   the optimiser's state and the step's number
        metrics/    the held-out loss

A save fills a directory of another name, which is renamed when all of it is written; so a directory
whose name is a number is whole, or is one that was being deleted. Nothing of a run is random but
what its seed gives, and a batch is a function of the step's number: a step's state is all there is.
"""

import contextlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from moe_jax.checkpoints.errors import CheckpointError
from moe_jax.checkpoints.orbax import errors_of_orbax, flat, nested, storage_of
from moe_jax.checkpoints.placing import place
from moe_jax.checkpoints.replace_directory import locked, sync, sync_tree
from moe_jax.config import Qwen3MoeConfig
from moe_jax.json_files import local_path
from moe_jax.training.objective import TrainOptions
from moe_jax.training.same_run import Json, describe_run, expect_same
from moe_jax.training.train_step import TrainState

SCHEMA_VERSION = 1  # as moe_jax.checkpoints.orbax counts it, where nothing is quantised

_METADATA, _METRICS = "_CHECKPOINT_METADATA", "metrics/metrics"
_LOSS = "held_out_loss"
_policies = ocp.training.preservation_policies


class Restored(NamedTuple):
    """A state to go on from.

    Attributes:
      state: as it was saved.
      notes: what a user should know: options that have changed, states that were not whole.
    """

    state: TrainState
    notes: list[str]


class TrainingStates:
    """A folder of states, held by one run at a time.

    The last `keep` states are kept, and beside them that of the least held-out loss.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        options: TrainOptions,
        data: Mapping[str, Json],
        config: Qwen3MoeConfig | None = None,
        keep: int = 2,
        anew: bool = False,
    ):
        """Opens the folder, or makes it. What a killed save left there is removed.

        Args:
          folder: of the run's states alone.
          options: how a step is computed.
          data: as in moe_jax.training.same_run.describe_run.
          config: what a load of the parameters gets; options.config by default.
          keep: how many of the last states are kept.
          anew: whether the states of the run before are removed.

        Raises:
          ValueError: keep is below 1.
          CheckpointError: another run holds the folder, or it cannot be read.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}; expected at least 1 state")
        self.folder = local_path(folder, "folder")
        self._run = describe_run(options, data)
        self._config = (options.config if config is None else config).to_hf()
        self._saving: int | None = None
        self._failed = False
        self._notes: list[str] = []
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as opening:
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    opening.enter_context(locked(self.folder))
                except BlockingIOError:
                    raise CheckpointError(
                        f"{self.folder} is held by another run that is under way; expected one at "
                        "a time"
                    ) from None
                self._prepare(anew)
            if jax.process_count() > 1:  # or another process might list what is being removed
                multihost_utils.sync_global_devices(f"states in {self.folder}")
            with errors_of_orbax(f"{self.folder} cannot be opened"):
                self._checkpointer = ocp.training.Checkpointer(
                    self.folder,
                    context=_context(),
                    preservation_policy=_policies.AnyPreservationPolicy(
                        [
                            _policies.LatestN(keep),
                            _policies.BestN(
                                get_metric_fn=lambda metrics: -metrics[_LOSS],
                                n=1,
                                keep_checkpoints_without_metrics=False,
                            ),
                        ]
                    ),
                    cleanup_tmp_directories=True,
                )
            self._closing = opening.pop_all()

    def __enter__(self) -> "TrainingStates":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """The numbers of the steps that there are states of."""
        return sorted(int(path.name) for path in self.folder.iterdir() if _is_step(path))

    def restore(self, target: TrainState) -> Restored | None:
        """The last whole state, or None if there is none.

        One that cannot be read is passed over for the one before it, and then gets another name.
        With several processes it is an error, because they might not agree on which that is.

        Args:
          target: shapes, dtypes and shardings to restore onto, as arrays or jax.ShapeDtypeStruct;
            each device reads its own part. The mesh may be another than the one that saved.
            A sharding that is None is the default device.

        Raises:
          CheckpointError: the state is of a run with other options, which are all listed; it has
            done more steps than this run is to do; or there are states and none is whole.
        """
        broken: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                allowed = expect_same(self.folder, self._run_of(step), self._run, step)
                state = self._load(step, target)
            except _NotWholeError as error:
                if jax.process_count() > 1:
                    raise CheckpointError(str(error)) from error
                broken[step] = str(error)
                continue
            if broken:
                self._set_aside(broken)
                self._checkpointer.reload()
            return Restored(state, [*self._notes, *allowed])
        if broken:
            raise CheckpointError(
                f"{self.folder} has no whole state: " + "; ".join(broken.values())
            )
        return None

    def save(self, state: TrainState, *, held_out_loss: float | None = None) -> None:
        """Begins to save a state; the state may be donated as soon as this returns.

        Waits for the save before it. All of the state is copied to the host.

        Args:
          state: its step is the state's name.
          held_out_loss: by which the best state is kept; without it a state is no candidate.

        Raises:
          CheckpointError: this save, or the one before it, failed: the disk is full, or the like.
            The states that were whole still are.
        """
        self.wait()
        step = int(state.step)
        self._saving = step
        with self._errors_of_save(step):
            self._checkpointer.save_checkpointables_async(
                step,
                {
                    "state": nested(state.params),
                    "training": {"optimizer": state.optimizer_state, "step": state.step},
                },
                force=True,
                metrics=None if held_out_loss is None else {_LOSS: float(held_out_loss)},
                custom_metadata={
                    "schema_version": SCHEMA_VERSION,
                    "config": self._config,
                    "run": self._run,
                },
            )

    def check(self) -> None:
        """Raises what `save` raises, if the save under way has failed; does not wait."""
        alone = jax.process_count() == 1  # or all of them would have to ask at the same time
        if alone and self._saving is not None and not self._checkpointer.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the save under way is on the disk; raises what `save` raises."""
        if self._saving is None:
            return
        with self._errors_of_save(self._saving):
            self._checkpointer.wait()
            if jax.process_index() == 0:  # Orbax leaves it to the system when to write small files
                sync_tree(self.folder / str(self._saving))
                sync(self.folder)
        self._saving = None

    def close(self) -> None:
        """Waits for the save under way and lets go of the folder; raises what `save` raises."""
        with self._closing:
            try:
                self.wait()
            finally:
                self._checkpointer.close()
                if self._failed:  # a part that did not fail may have been written until now
                    self._remove_unfinished()

    def _prepare(self, anew: bool) -> None:
        """Removes all states; or only what Orbax could not list, which has no place in the way."""
        if anew:
            for path in sorted(self.folder.iterdir(), reverse=True):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            return
        newer = False
        for step in reversed(self.steps):
            path = self.folder / str(step)
            try:
                json.loads((path / _METADATA).read_text())
                if (path / _METRICS).exists():
                    json.loads((path / _METRICS).read_text())
                newer = True
            except (OSError, ValueError) as error:
                if newer:  # a process was killed while it deleted this one
                    shutil.rmtree(path)
                else:
                    self._set_aside({step: f"{path} is not whole: {error}"})

    def _set_aside(self, broken: Mapping[int, str]) -> None:
        """Gives states another name, so that the run can save those steps again."""
        for step, why in broken.items():
            number = 0
            while (aside := self.folder / f"{step}.damaged{number or ''}").exists():
                number += 1
            (self.folder / str(step)).rename(aside)
            self._notes.append(f"{why}; it is {aside.name} now")

    def _run_of(self, step: int) -> Mapping[str, Any]:
        """The description of the run that saved the step."""
        path = self.folder / str(step)
        with _not_whole(path):
            metadata = json.loads((path / _METADATA).read_text())["custom_metadata"]
            version, run = metadata["schema_version"], metadata["run"]
        if version > SCHEMA_VERSION:
            raise CheckpointError(
                f"{path} has schema_version {version}; expected at most {SCHEMA_VERSION}: a later "
                "version of this library wrote it"
            )
        return run

    def _load(self, step: int, target: TrainState) -> TrainState:
        def abstract(leaf: Any) -> Any:
            if leaf.sharding is None:
                return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

        def placed(leaf: Any, array: Any) -> jax.Array:
            return place(leaf, None, lambda index: array) if leaf.sharding is None else array

        wanted = jax.tree.map(abstract, target)
        with _not_whole(self.folder / str(step)):
            loaded = self._checkpointer.load_checkpointables(
                step,
                {
                    "state": nested(wanted.params),
                    "training": {"optimizer": wanted.optimizer_state, "step": wanted.step},
                },
            )
        training = loaded["training"]
        if int(training["step"]) != step:
            raise _NotWholeError(
                f"{self.folder / str(step)} holds step {int(training['step'])}; expected {step}"
            )
        state = TrainState(
            params=dict(flat(loaded["state"])),
            optimizer_state=training["optimizer"],
            step=training["step"],
        )
        return jax.tree.map(placed, target, state)

    def _remove_unfinished(self) -> None:
        for attempt in range(3 if jax.process_index() == 0 else 0):
            time.sleep(0.1 * attempt)  # another thread of the save may write on for a moment
            for left in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)

    @contextlib.contextmanager
    def _errors_of_save(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise errors of every type
            self._saving = None
            self._failed = True
            self._remove_unfinished()
            kept = f"step {self.steps[-1]} is kept" if self.steps else "there is none before it"
            raise CheckpointError(
                f"the state of step {step} cannot be saved in {self.folder}; of the whole ones "
                f"{kept}. Orbax says: {error}"
            ) from error


class _NotWholeError(Exception):
    """A state that cannot be read."""


@contextlib.contextmanager
def _not_whole(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise errors of every type
        raise _NotWholeError(f"{path} is not whole: {error}") from error


def _is_step(path: pathlib.Path) -> bool:
    return path.name.isdecimal() and path.is_dir()


def _context() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = storage_of
    return context
