"""experiments.train on meshes and in several processes: its flags; two processes that train."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from experiments import train
from experiments.bench import train_records
from moe_jax.training import OptimizerOptions
from tests.moe_jax.tiny import TINY

FLAGS = (
    "--vocab_size=280", "--layers=1", "--hidden=64", "--experts=4", "--moe_intermediate=16",
    "--context=16", "--batch=4", "--learning_rate=0.01", "--schedule=constant", "--warmup_steps=0",
    "--log_every=1", "--sample_tokens=0", "--compute_dtype=float32", "--commit=abc",
)  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh=data=2", "--batch=3"], "--batch is 3; expected a multiple of 2, the devices al"),
        (["--mesh=pipe=2"], "--mesh has 'pipe=2'; expected each of data, expert, tensor once at"),
        (["--processes=2"], "--processes is 2 and --coordinator ''; expected both, as in --proc"),
        (["--coordinator=a:1"], "--processes is 1 and --coordinator 'a:1'; expected both, as in"),
        (
            ["--coordinator=a:1", "--processes=2", "--process_id=2", "--mesh=data=2"],
            "--process_id is 2; expected 0 to 1, as --processes is 2",
        ),
        (
            ["--coordinator=a:1", "--processes=2"],
            "--mesh is ''; expected at least a device for each of 2 processes, as in data=2",
        ),
        (["--expert_exchange=dense"], "--expert_exchange is 'dense'; expected one of auto, ragg"),
    ],
)
def test_wrong_flags(flags, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        train.run([*flags, f"--out={tmp_path}"])


def test_a_step_is_computed_on_the_mesh_that_flags_say(tmp_path):
    settings = train.Settings(mesh=("expert=1",), expert_exchange="gather", out=tmp_path)
    options = settings.step_options(TINY, OptimizerOptions())
    assert options.parallelism.exchange == "gather"
    assert options.parallelism.fsdp and options.parallelism.mesh.size == 1
    assert train.Settings(out=tmp_path).step_options(TINY, OptimizerOptions()).parallelism is None
    with pytest.raises(ValueError, match="devices; expected 64 for data 1, expert 64, tensor 1"):
        train.Settings(mesh=("expert=64",), batch=64, out=tmp_path).step_options(
            TINY, OptimizerOptions()
        )


def start(*flags, devices: int = 1) -> subprocess.Popen:
    flags = [*FLAGS, *flags]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def finish(*processes: subprocess.Popen) -> list[str]:
    printed = [process.communicate(timeout=280)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), printed
    return printed


def steps(out) -> dict[int, train_records.StepRow]:
    rows = train_records.steps_of(train_records.read_record(out / "metrics.jsonl"))
    return {row.step: row for row in rows}


@pytest.mark.slow
def test_two_processes_train_and_one_goes_on(tmp_path):
    """Over Gloo, a device each; then they go on from their state, and then one process does."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(6):
        body = f"def name_{i}(x):\n    return x + {i}\n\n\n" * 3
        (text / f"part_{i}.py").write_text(body)
    both, alone = tmp_path / "both", tmp_path / "alone"
    given = (f"--text={text}", f"--out={both}")
    for total in (2, 3):
        with socket.socket() as probe:  # a port that was free just now
            probe.bind(("localhost", 0))
            address = f"--coordinator=localhost:{probe.getsockname()[1]}"
        together = (*given, address, "--processes=2", "--mesh=data=2", f"--steps={total}")
        printed = finish(*(start(*together, f"--process_id={index}") for index in range(2)))
        assert ("going on from step 2 of 3" in printed[1]) == (total == 3)
        assert "Wrote" in printed[0] and "Wrote" not in printed[1]
    finish(start(*given, "--steps=4"))
    finish(start(f"--text={text}", f"--out={alone}", "--steps=4"))
    found, expected = steps(both), steps(alone)
    assert found.keys() == expected.keys() == {1, 2, 3, 4}
    for step, row in expected.items():
        assert found[step].load == row.load
        np.testing.assert_allclose(found[step].loss, row.loss, rtol=1e-5)
        np.testing.assert_allclose(found[step].gradient_norm, row.gradient_norm, rtol=1e-5)
