"""Which platform a computation is written for."""

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest

from moe_jax.attention import attention
from moe_jax.dispatch import record_choices
from moe_jax.experts import ExpertWeights, experts
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


def test_the_environment_variables_reach_the_ops(monkeypatch):
    monkeypatch.setenv("MOE_JAX_PLATFORM", "npu")
    monkeypatch.setenv("MOE_JAX_EXPERTS_BACKEND", "reference")
    weights = ExpertWeights(gate_up=jnp.ones((2, 2, 4, 4)), down=jnp.ones((2, 4, 4)))
    ids, slots, heads = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32), (1, 1, 1, 2)
    q = jnp.ones(heads)

    def traced():
        with record_choices() as record:
            jax.eval_shape(experts, jnp.ones((1, 4)), weights, ids, jnp.ones((1, 1)))
            jax.eval_shape(
                functools.partial(attention, query_slots=slots, key_slots=slots), q, q, q
            )
        return [(request.op, request.platform, choice.backend) for request, choice in record]

    assert traced() == [("experts", "ascend", "reference"), ("attention", "ascend", "xla")]
    monkeypatch.setenv("MOE_JAX_ATTENTION_BACKEND", "flash")
    with pytest.raises(ValueError, match="MOE_JAX_ATTENTION_BACKEND is 'flash'; expected 'auto'"):
        traced()
