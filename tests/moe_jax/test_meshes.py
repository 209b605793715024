"""Meshes of several devices: equality with one device, what is refused, who reads which rows."""

import dataclasses
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from moe_jax.parallelism import Parallelism
from moe_jax.parameters import from_arrays
from moe_jax.sharding import make_mesh
from moe_jax.training import PackedDocuments, gradients_of
from tests.moe_jax import on_meshes
from tests.quick_process import XLA_FLAGS

FAST = ("gradients", "step", "generation")


@pytest.mark.parametrize(
    "checks",
    [FAST, pytest.param(sorted(on_meshes.CHECKS.keys() - {*FAST}), marks=pytest.mark.slow)],
    ids=["fast", "slow"],
)
def test_on_four_devices(checks):
    """See on_meshes: every gradient on seven meshes, a step on one, and generated tokens.

    The balance loss's gradient reaches the routers there, because it does on one device
    (test_train_step.py) and the gradients are the same.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {XLA_FLAGS}",
    }
    command = [sys.executable, "-m", on_meshes.__name__, *checks]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "all good"


def test_each_device_reads_its_own_rows():
    """On a mesh of one device these are all; the parts of two add up to the batch."""
    packed = PackedDocuments([range(1, 60)], 5)
    whole = packed.batch(1, A=2, B=4)
    found = packed.batch_on_mesh(1, A=2, B=4, parallelism=Parallelism(mesh=make_mesh()))
    for name in ("input_ids", "labels", "segment_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
        halves = [
            getattr(packed.batch(1, A=2, B=4, rows=slice(first, first + 2)), name)
            for first in (0, 2)
        ]
        np.testing.assert_array_equal(np.concatenate(halves, axis=1), getattr(whole, name))


def test_rows_that_the_mesh_does_not_divide_are_refused():
    parallelism = Parallelism(mesh=AbstractMesh((2, 2), ("data", "expert")))
    with pytest.raises(ValueError, match="a micro-batch has 6 rows; expected a multiple of 4"):
        parallelism.rows("training", 6)


def test_explicit_axes_in_context_are_refused_by_name():
    options = dataclasses.replace(
        on_meshes.OPTIONS, parallelism=Parallelism(mesh=make_mesh(devices=jax.devices()[:1]))
    )
    model = from_arrays(on_meshes.CONFIG, on_meshes.PARAMS)
    refused = pytest.raises(ValueError, match=r"jax.set_mesh holds .*Explicit.*; expected AxisType")
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        with refused:
            gradients_of(on_meshes.PARAMS, on_meshes.ROWS, options)
        with refused:
            model(on_meshes.ROWS.input_ids[0], parallelism=options.parallelism)
