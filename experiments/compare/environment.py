"""Where a run was made: the first record of its result file."""

import datetime
import pathlib
import platform
import shlex
import subprocess
import sys

import jax
import jaxlib

from experiments.compare.records import Environment
from pallas_kernels.decode_experts.tuned_tables import device_slug

_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def describe(
    *, seed: int, repeats: int, commit: str, read_ceiling_tbps: float | None
) -> Environment:
    """Looks at device, versions and checkout; `commit` is for where there is no checkout."""
    device = jax.devices()[0]
    return Environment(
        device=device_slug(device.device_kind),
        device_kind=device.device_kind,
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        driver=_driver() if device.platform == "gpu" else None,
        python=platform.python_version(),
        commit=checked_out_commit() or commit or None,
        command=_command(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seed=seed,
        repeats=repeats,
        read_ceiling_tbps=read_ceiling_tbps,
    )


def checked_out_commit() -> str | None:
    """The commit, "-dirty" added if tracked files differ from it; None outside a checkout."""
    if not (_REPOSITORY / ".git").exists():  # a copy of the files inside another checkout
        return None
    commit = _output("git", "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return commit + ("-dirty" if changed else "")


def _driver() -> str | None:
    listed = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return listed.splitlines()[0].strip() if listed else None


def _command() -> str:
    """The command line, with `python -m` as it was typed."""
    script = pathlib.Path(sys.argv[0])
    module = getattr(sys.modules["__main__"], "__spec__", None)
    called = f"python -m {module.name}" if module is not None else f"python {script}"
    return " ".join([called, *map(shlex.quote, sys.argv[1:])])


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(
            command, cwd=_REPOSITORY, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
