"""What is found of layers that repeat themselves or do not."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from experiments.compare import layers, same_bits
from experiments.compare.baselines import XLA_BASELINES
from experiments.compare.routings import make_routings
from pallas_kernels.decode_experts.shapes import SHAPES

TINY = SHAPES["tiny"]
T = 5


@pytest.fixture(scope="module")
def arguments():
    weights = layers.make_layer(jax.random.key(0), TINY)
    routing = make_routings("uniform", TINY, T, 1, 0)[0]
    return weights, layers.make_tokens(0, T, TINY.H), routing


def test_a_function_of_each_token_passes_both(arguments):
    def layer(x, weights, expert_ids, expert_weights):
        return x * jnp.sum(expert_weights, axis=1, keepdims=True)

    assert same_bits.repeated(layer, *arguments)
    assert same_bits.alone(layer, *arguments)


def test_another_result_each_time_is_found(arguments):
    calls = itertools.count()

    def layer(x, weights, expert_ids, expert_weights):
        return x + next(calls) // (same_bits.REPEATS - 1)  # the last one

    assert not same_bits.repeated(layer, *arguments)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_neighbour_that_shows_is_found(arguments, axis):
    def layer(x, weights, expert_ids, expert_weights):
        if axis == 0:  # the number of neighbours
            return x * x.shape[0]
        return x + jnp.arange(x.shape[0])[:, None]  # the place among them

    assert same_bits.repeated(layer, *arguments)
    assert not same_bits.alone(layer, *arguments)


def test_one_bit_is_enough(arguments):
    weights, x, routing = arguments

    def layer(x, weights, expert_ids, expert_weights):
        y = XLA_BASELINES["xla_gather"](
            x, weights, expert_ids, expert_weights, out_dtype=jnp.float32
        )
        return jnp.nextafter(y, jnp.inf) if x.shape[0] > 1 else y

    assert not same_bits.alone(layer, weights, x, routing)
