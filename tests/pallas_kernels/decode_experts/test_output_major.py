import jax.numpy as jnp
import pytest

from pallas_kernels.decode_experts import LAYOUTS, OutputMajorConfig, decode_experts
from tests.pallas_kernels.decode_experts.cases import (
    Size,
    assert_right,
    assert_same_bits,
    make_case,
)
from tests.pallas_kernels.decode_experts.layout_suite import LayoutSuite
from tests.pallas_kernels.decode_experts.lowering_suite import LoweringSuite
from tests.pallas_kernels.machine import ON_GPU


class TestOutputMajor(LayoutSuite, LoweringSuite):
    layout = "output_major"
    small_rings = OutputMajorConfig(
        gate_up_block_m=64,
        gate_up_block_k=64,
        gate_up_num_stages=2,
        down_block_m=64,
        down_block_k=64,
        down_num_stages=2,
    )
    race_config = small_rings
    # No gathering and no combine: nothing but the two kernels.
    forbidden_operations = ("sort", "scatter", "gather", "reduce", "dot_general", "while")

    def kernels(self, size):
        return ["output_major_gate_up", "output_major_down"]


@pytest.mark.skipif(not ON_GPU, reason="a CPU may fuse a product and an addition or not")
@pytest.mark.parametrize("T", [1, 7, 16])
def test_same_bits_whatever_the_config(T, seed):
    size = Size(T=T, E=128, K=8, H=2048, I=768)
    case = make_case(size, seed)
    expected = TestOutputMajor().run(case)
    assert_right(expected, case)
    narrow = OutputMajorConfig(
        gate_up_block_m=64, gate_up_block_k=64, down_block_m=64, down_block_k=64
    )
    for config in (*LAYOUTS["output_major"].candidates(size.shapes, T), narrow):
        out = decode_experts(*case, layout="output_major", config=config, out_dtype=jnp.float32)
        assert_same_bits(out, expected)
