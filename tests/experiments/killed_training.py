"""Training that is killed again and again, against a run that was left alone.

    python -m tests.experiments.killed_training FOLDER KILLS SEED
    python -m tests.experiments.killed_training commit STEP FLAGS ...

The first trains twice: once undisturbed, and once under SIGKILL at KILLS random moments. SEED draws
about half of them from a process's life until it has saved a state, its imports included, and half
from the seconds after that. Each time the same command goes on. Prints a line for each kill, and
what differs in the end: nothing.
The second trains with FLAGS, and ends itself by SIGKILL when the state of STEP is written but not
yet renamed.
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from experiments import train
from experiments.bench import train_records
from tests.quick_process import XLA_FLAGS

SIZES = ("--vocab_size=280", "--layers=1", "--hidden=32", "--experts=4", "--moe_intermediate=16")
BATCH = ("--context=16", "--batch=2", "--accumulate=2", "--learning_rate=0.01")
SAVE_EVERY = 4
STEPS_PER_KILL = 50  # so that the last kill finds a run under way


def write_text(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(6):
        body = f"def name_{i}(x):\n    return x + {i}\n\n\n" * 3
        (folder / f"part_{i}.py").write_text(f"# ünï {i}\n{body}")
    return folder


def flags(text: pathlib.Path, out: pathlib.Path, *, steps: int, save_every: int) -> list[str]:
    """A tiny run's."""
    often = (f"--steps={steps}", f"--save_every={save_every}", "--log_every=2")
    return [f"--text={text}", *SIZES, *BATCH, *often, "--sample_tokens=0", f"--out={out}"]


def differences(out: pathlib.Path, expected: pathlib.Path) -> list[str]:
    """What of two finished runs differs: the last state, the checkpoint's files, the metrics."""
    found = []
    last = str(max(int(p.name) for p in (expected / "states").iterdir() if p.name.isdecimal()))
    for part in ("state", "training"):
        with warnings.catch_warnings(action="ignore"):  # there is one device
            trees = [
                ocp.load(folder / "states" / last, checkpointable_name=part)
                for folder in (out, expected)
            ]
        leaves = [jax.tree_util.tree_leaves_with_path(tree) for tree in trees]
        assert len(leaves[1]) >= 4
        if [path for path, _ in leaves[0]] != [path for path, _ in leaves[1]]:
            found.append(f"the tree of {part}")
        for (path, one), (_, other) in zip(*leaves, strict=False):
            if bits(one) != bits(other):
                found.append(part + jax.tree_util.keystr(path))
    for file in (expected / "checkpoint").iterdir():
        if (out / "checkpoint" / file.name).read_bytes() != file.read_bytes():
            found.append(f"checkpoint/{file.name}")
    if rows_of(out) != rows_of(expected):
        found.append("metrics.jsonl")
    return found


def bits(array) -> tuple:
    array = np.asarray(array)
    return array.dtype.name, array.shape, array.tobytes()


def rows_of(out: pathlib.Path) -> list[dict]:
    """The metrics in order, without what depends on the time and the place."""
    rows = [vars(row).copy() for row in train_records.read_record(out / "metrics.jsonl").rows]
    for row in rows:
        del row["run"]
        row.pop("tokens_per_second", None)
    return rows


def train_until_commit(step: int, argv: list[str]) -> None:
    def hook(event: str, arguments: tuple) -> None:
        if event == "os.rename" and os.fspath(arguments[1]).endswith(f"/states/{step}"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    train.run(argv)


def begin(argv: list[str]) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS}
    command = [sys.executable, "-u", "-m", "experiments.train", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def whole_states(out: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (out / "states").glob("*") if path.name.isdecimal())


def wait_for_a_state(process: subprocess.Popen, out: pathlib.Path) -> float:
    """Waits until there is a new one, or the process ends; the seconds that it took."""
    begun, before = time.monotonic(), whole_states(out)
    while process.poll() is None and not set(whole_states(out)) - set(before):
        time.sleep(0.01)
    return time.monotonic() - begun


def kill_once(argv: list[str], out: pathlib.Path, rng: random.Random, life: float) -> str | None:
    """Kills one process at a random moment; says when, or None if it had finished."""
    process, begun = begin(argv), time.monotonic()
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, life))
    else:
        wait_for_a_state(process, out)
        time.sleep(rng.uniform(0, 2))
    process.kill()
    process.communicate()
    if process.returncode != -signal.SIGKILL:
        return None
    return f"after {time.monotonic() - begun:5.2f} s"


def main(folder: pathlib.Path, kills: int, seed: int) -> None:
    text, rng = write_text(folder / "text"), random.Random(seed)
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    steps = STEPS_PER_KILL * kills
    process = begin(flags(text, undisturbed, steps=steps, save_every=SAVE_EVERY))
    life = wait_for_a_state(process, undisturbed)
    process.communicate()
    assert process.returncode == 0
    argv, cut_off = flags(text, killed, steps=steps, save_every=SAVE_EVERY), 0
    unfinished: list[str] = []
    for number in range(1, kills + 1):
        when = kill_once(argv, killed, rng, life)
        assert when is not None, f"finished after {number - 1} kills"
        before, left = unfinished, (killed / "states").glob("*tmp*")
        unfinished = [path.name.partition(".")[0] for path in left]
        cut_off += unfinished not in ([], before)
        states = f"states {whole_states(killed)}"
        if unfinished:
            states += f", the save of {', '.join(unfinished)} cut off"
        print(f"kill {number:2d} {when}: {states}", flush=True)
    process = begin(argv)
    said, _ = process.communicate()
    assert process.returncode == 0
    print(next(line for line in said.splitlines() if line.startswith("going on from")))
    different = differences(killed, undisturbed)
    print(f"{kills} kills, {cut_off} in a save; {steps} steps; differences: {different}")
    assert not different


if __name__ == "__main__":
    if sys.argv[1] == "commit":
        train_until_commit(int(sys.argv[2]), sys.argv[3:])
    else:
        main(pathlib.Path(sys.argv[1]).absolute(), *map(int, sys.argv[2:]))
