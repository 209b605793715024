"""Checkpoints straight onto a mesh, and the rule that says what goes where."""

import os
import subprocess
import sys

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from moe_jax.sharding import expert_parallel
from tests.moe_jax.checkpoints import on_four_devices
from tests.quick_process import XLA_FLAGS


def test_on_four_devices(tmp_path):
    """See on_four_devices: each device's shard is read from the files, and nothing else."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {XLA_FLAGS}",
    }
    command = [sys.executable, "-m", on_four_devices.__name__, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "all good"


def test_only_stacked_experts_are_split():
    rule = expert_parallel(jax.make_mesh((1,), ("expert",)))
    assert rule("layers.3.mlp.experts.gate_up", (8, 2, 4, 4)).spec == PartitionSpec("expert")
    assert rule("layers.3.mlp.experts.down", (8, 4, 4)).spec == PartitionSpec("expert")
    for name in ("layers.3.mlp.gate.weight", "layers.3.mlp.up_proj.weight", "norm.weight"):
        assert rule(name, (8, 4)).spec == PartitionSpec()


def test_axis_that_the_mesh_lacks():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=r"axis is 'expert'; expected one of the mesh's, \['data'"):
        expert_parallel(mesh)
    assert expert_parallel(mesh, "data")("norm.weight", (4,)).mesh == mesh
