"""One MoE layer's expert math at decode time, in layouts that can be swapped and compared.

Start at `api.py` (what a user calls), `reference.py` (what it means) and `layouts.py`.
"""

from pallas_kernels.decode_experts.api import decode_experts
from pallas_kernels.decode_experts.choose_layout import (
    MODES,
    LayoutChoice,
    choose_layout,
    override_layout,
)
from pallas_kernels.decode_experts.configs import Layout
from pallas_kernels.decode_experts.expert_major_config import ExpertMajorConfig
from pallas_kernels.decode_experts.layouts import LAYOUTS
from pallas_kernels.decode_experts.output_major import OutputMajorConfig
from pallas_kernels.decode_experts.reference import reference_experts
from pallas_kernels.decode_experts.shapes import ExpertShapes
from pallas_kernels.decode_experts.weights import ExpertWeights

__all__ = [
    "LAYOUTS",
    "MODES",
    "ExpertMajorConfig",
    "ExpertShapes",
    "ExpertWeights",
    "Layout",
    "LayoutChoice",
    "OutputMajorConfig",
    "choose_layout",
    "decode_experts",
    "override_layout",
    "reference_experts",
]
