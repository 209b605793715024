"""What is found of layers that are off, that repeat themselves or that do not."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import accuracy
from experiments.bench.inputs import draw_case
from pallas_kernels.decode_experts.shapes import SHAPES


def test_errors_are_over_all_cases_together():
    references = [np.array([[3.0, 4.0]]), np.array([[0.0, 12.0]])]
    found = accuracy.measure_errors(lambda *_: jnp.array([[3.0, 8.0]]), [(), ()], references)
    # The differences are (0, 4) and (3, -4), the references (3, 4) and (0, 12).
    assert found.relative == pytest.approx((41 / 169) ** 0.5)
    assert found.largest == 4.0
    assert found.rounding == 0.0
    with pytest.raises(AssertionError):
        accuracy.measure_errors(lambda *_: jnp.array([[3.0, jnp.nan]]), [(), ()], references)


def _errors_of(relative, rounding=1.66e-3):
    return accuracy.OutputErrors(relative=relative, largest=0.0, rounding=rounding)


def test_layout_above_its_bound_is_named():
    check = functools.partial(accuracy.check_layout, "output_major", dtype="bfloat16")
    check(_errors_of(1.7e-3), 1e-6)
    check(_errors_of(1.9e-3, rounding=1.89e-3), 1e-6)  # few outputs: bf16 itself is that far off
    with pytest.raises(AssertionError, match=r"output_major: relative error 2.00e-03 of the bf"):
        check(_errors_of(2e-3), 1e-6)
    with pytest.raises(AssertionError, match=r"of the float32 output is above 1.0e-04"):
        check(_errors_of(1.7e-3), 2e-4)
    with pytest.raises(AssertionError, match="nan"):
        check(_errors_of(float("nan")), None)


@pytest.fixture(scope="module")
def case():
    return draw_case(SHAPES["tiny"], 5, 0)


def test_a_function_of_each_token_passes_both(case):
    def layer(x, weights, expert_ids, expert_weights):
        return x * jnp.sum(expert_weights, axis=1, keepdims=True)

    assert accuracy.same_bits_repeated(layer, case)
    assert accuracy.same_bits_alone(layer, case)
    # A mode may take another layout for one token.
    assert not accuracy.same_bits_alone(layer, case, lambda x, *others: x)


def test_another_result_each_time_is_found(case):
    calls = itertools.count()

    def layer(x, weights, expert_ids, expert_weights):
        return x + next(calls) // (accuracy.REPEATS - 1)  # the last one

    assert not accuracy.same_bits_repeated(layer, case)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_neighbour_that_shows_is_found(case, axis):
    def layer(x, weights, expert_ids, expert_weights):
        if axis == 0:  # the number of neighbours
            return x * x.shape[0]
        return x + jnp.arange(x.shape[0])[:, None]  # the place among them

    assert accuracy.same_bits_repeated(layer, case)
    assert not accuracy.same_bits_alone(layer, case)


def test_one_bit_is_enough(case):
    def layer(x, weights, expert_ids, expert_weights):
        return jnp.nextafter(x, x + 1) if x.shape[0] > 1 else x

    assert not accuracy.same_bits_alone(layer, case)
