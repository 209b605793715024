"""Which platform a computation is written for."""

import subprocess
import sys
import warnings

import jax
import pytest

from moe_jax.platforms import ascend_names, resolve_platform


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu", "cpu"),
        ("CUDA", "cuda"),
        ("gpu", "cuda"),
        ("ascend", "ascend"),
        ("Ascend", "ascend"),
        (" NPU ", "ascend"),
    ],
)
def test_names_are_case_folded(name, expected):
    assert resolve_platform(name, environment={}) == expected


def test_argument_then_environment_then_jax():
    environment = {"MOE_JAX_PLATFORM": "npu"}
    assert resolve_platform("cuda", environment=environment) == "cuda"
    assert resolve_platform(environment=environment) == "ascend"
    here = "cpu" if jax.default_backend() == "cpu" else "cuda"
    assert resolve_platform(environment={}) == here


def test_the_names_of_ascend_are_configurable():
    environment = {"MOE_JAX_ASCEND_NAMES": "xla_npu, DaVinci"}
    assert ascend_names(environment) == {"ascend", "xla_npu", "davinci"}
    assert resolve_platform("XLA_NPU", environment=environment) == "ascend"
    with pytest.raises(ValueError, match="and 'cuda' is another platform"):
        ascend_names({"MOE_JAX_ASCEND_NAMES": "npu,cuda"})


def test_an_unknown_platform_gets_one_warning():
    with pytest.warns(UserWarning, match="platform 'quantum' is none of cpu, cuda, ascend, npu"):
        assert resolve_platform("Quantum", environment={}) == "quantum"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_platform("quantum", environment={}) == "quantum"


def test_the_environment_variable_reaches_the_experts(tmp_path):
    script = (
        "import jax.numpy as jnp\n"
        "from moe_jax.dispatch import record_choices\n"
        "from moe_jax.experts import ExpertWeights, experts\n"
        "weights = ExpertWeights(gate_up=jnp.ones((2, 2, 4, 4)), down=jnp.ones((2, 4, 4)))\n"
        "with record_choices() as record:\n"
        "    experts(jnp.ones((1, 4)), weights, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1)))\n"
        "(request, choice), = record\n"
        "print(request.platform, choice.backend)\n"
    )
    environment = {
        "JAX_PLATFORMS": "cpu",
        "MOE_JAX_PLATFORM": "npu",
        "MOE_JAX_EXPERTS_BACKEND": "reference",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["ascend", "reference"]
