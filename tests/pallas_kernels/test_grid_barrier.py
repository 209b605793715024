"""The counter of grid_barrier, as XLA gets it."""

import jax
import numpy as np

from pallas_kernels.decode_experts import decode_experts
from pallas_kernels.mosaic import grid_barrier_counter
from tests.pallas_kernels.decode_experts.cases import Size, make_case
from tests.pallas_kernels.machine import lower_for_cuda


def test_the_counter_starts_at_zero_and_is_like_no_other_constant():
    # XLA keeps constants of the same bytes once for all programs, and kernels write to this one.
    counter = np.asarray(grid_barrier_counter())
    assert counter.dtype == np.int32
    assert counter[0] == 0
    assert len(set(counter[1:].tolist())) > 8


def test_a_program_holds_it_as_a_constant():
    case = make_case(Size(T=2, E=4, K=2, H=64, I=64), 0)

    def layer(*arguments):
        return decode_experts(*arguments, layout="streamed")

    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tuple(case))
    words = ", ".join(map(str, np.asarray(grid_barrier_counter()).tolist()))
    assert f"stablehlo.constant dense<[{words}]>" in lower_for_cuda(layer, *shapes)
