"""The frame holds: import arrows, bare pins, no lock file, no registry host."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _load_checker():
    spec = importlib.util.spec_from_file_location("check_tree", ROOT / ".ci" / "check_tree.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_tree = _load_checker()

# Spelt apart, so that this file does not itself name a host.
HOST = ".".join(("files", "pythonhosted", "org"))


def test_imports_run_one_way():
    assert check_tree.import_violations(ROOT) == []


def test_pins_are_bare():
    assert check_tree.pin_violations((ROOT / "pyproject.toml").read_text()) == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_lock_file_and_no_registry_host():
    names = check_tree.files_in_git(ROOT)
    assert "pyproject.toml" in names
    for name in names:
        assert check_tree.file_violations(name, (ROOT / name).read_text(errors="replace")) == []


@pytest.mark.parametrize(
    ("package", "statement", "name"),
    [
        ("pallas_kernels", "import moe_jax", "moe_jax"),
        ("pallas_kernels", "import numpy, experiments.timing as t", "experiments.timing"),
        ("pallas_kernels", "from moe_jax import config", "moe_jax.config"),
        (
            "pallas_kernels",
            "def f():\n    from moe_jax.experts import api",
            "moe_jax.experts.api",
        ),
        (
            "moe_jax",
            "from experiments.compare_layouts import main",
            "experiments.compare_layouts.main",
        ),
        ("moe_jax", "from absl import flags", "absl.flags"),
    ],
)
def test_planted_import_is_caught(tmp_path, package, statement, name):
    folder = tmp_path / package / "inner"
    folder.mkdir(parents=True)
    (folder / "planted.py").write_text(f'"""Docstring."""\n{statement}\n')
    [violation] = check_tree.import_violations(tmp_path)
    assert violation.startswith(f"{package}/inner/planted.py:")
    assert violation.endswith(f"{package} must not import {name}")


@pytest.mark.parametrize(
    ("package", "statement"),
    [
        ("moe_jax", "import pallas_kernels.decode_experts"),
        ("experiments", "import moe_jax, pallas_kernels\nfrom absl import flags"),
        (
            "pallas_kernels",
            "import moe_jaxtyping\nfrom . import experiments\nfrom absl import logging",
        ),
    ],
)
def test_allowed_import_passes(tmp_path, package, statement):
    (tmp_path / package).mkdir()
    (tmp_path / package / "fine.py").write_text(statement)
    assert check_tree.import_violations(tmp_path) == []


@pytest.mark.parametrize(
    "pin",
    [
        "jax>=0.11.2",
        "jax",
        "jax[cuda13]==0.11.2",
        "jax==0.11.2; python_version>'3'",
        "jax == 1",
        "jax==*",
    ],
)
def test_planted_pin_is_caught(pin):
    [violation] = check_tree.pin_violations(
        f'tool.uv.constraint-dependencies = ["numpy==2.5.2", "{pin}"]'
    )
    assert repr(pin) in violation


def test_planted_index_is_caught():
    [violation] = check_tree.pin_violations('[[tool.uv.index]]\nurl = "somewhere"')
    assert "tool.uv.index" in violation


@pytest.mark.parametrize(
    "name", ["uv.lock", "sub/poetry.lock", "pylock.toml", "notebooks/pylock.gpu.toml"]
)
def test_planted_lock_file_is_caught(name):
    assert check_tree.file_violations(name, "") == [f"{name}: is a lock file"]


@pytest.mark.parametrize(
    "line",
    [
        f"url = https://{HOST}/packages/x.whl",
        "see " + "pypi" + ".org",
        "--index-url" + "=https://mirror.example/root",
        "https://mirror.example/root" + "/simple/",
    ],
)
def test_planted_host_is_caught(line):
    [violation] = check_tree.file_violations("README.md", f"first line\n{line}\n")
    assert violation.startswith("README.md:2: names a package registry's host")


def test_prose_passes():
    text = "Installs from PyPI. A simple registry of layouts: https://docs.jax.dev/en/latest/simple_guide"
    assert check_tree.file_violations("block.py", text) == []
