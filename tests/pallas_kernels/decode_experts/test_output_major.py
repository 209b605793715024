from pallas_kernels.decode_experts import OutputMajorConfig
from tests.pallas_kernels.decode_experts.layout_suite import LayoutSuite


class TestOutputMajor(LayoutSuite):
    layout = "output_major"
    small_rings = OutputMajorConfig(
        gate_up_rows=64,
        gate_up_columns=64,
        gate_up_slots=2,
        down_rows=64,
        down_columns=64,
        down_slots=2,
    )
    # No grouping and no combine: nothing but the two kernels.
    forbidden_operations = ("sort", "scatter", "gather", "reduce", "dot_general", "while")
