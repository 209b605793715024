"""decode_experts under JAX's transformations: what the wrapper does, once for all layouts."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from pallas_kernels.decode_experts import LAYOUTS, decode_experts
from tests.pallas_kernels.decode_experts.cases import (
    Case,
    Size,
    assert_right,
    assert_same_bits,
    make_case,
)
from tests.pallas_kernels.machine import INTERPRET

# expert_major in one fused grid, whose counters are for one call at a time.
SIZE = Size(T=2, E=3, K=2, H=64, I=64)


def run(case: Case, layout: str = "expert_major") -> jax.Array:
    return decode_experts(*case, layout=layout, out_dtype=jnp.float32, interpret=INTERPRET)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_a_clear_error(layout, seed):
    case = make_case(SIZE, seed)

    def loss(x, weights, expert_weights):
        return run(Case(x, weights, case.expert_ids, expert_weights), layout).sum()

    arguments = (case.x, case.weights, case.expert_weights)
    for argument in range(3):
        with pytest.raises(NotImplementedError, match=rf"{layout}.*reference_experts"):
            jax.grad(loss, argument)(*arguments)
    with pytest.raises(NotImplementedError, match=rf"{layout}.*reference_experts"):
        jax.jvp(loss, arguments, arguments)


def test_jit(seed):
    case = make_case(SIZE, seed)
    assert_same_bits(jax.jit(run)(case), run(case))


def test_vmap_over_batches(seed):
    case = make_case(SIZE._replace(T=4), seed)
    expected = run(case)

    def one_batch(x, expert_ids, expert_weights):
        return run(Case(x, case.weights, expert_ids, expert_weights))

    batches = [array.reshape(2, 2, -1) for array in (case.x, case.expert_ids, case.expert_weights)]
    out = jax.vmap(one_batch)(*batches)
    assert_right(out.reshape(expected.shape), case)


def test_scan_over_layers(seed):
    cases = [make_case(SIZE, seed), make_case(SIZE, seed + 1)]
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *cases)
    _, out = lax.scan(lambda carry, case: (carry, run(case)), None, stacked)
    for layer, case in enumerate(cases):
        assert_same_bits(out[layer], run(case))
