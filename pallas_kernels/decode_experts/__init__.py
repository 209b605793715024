"""One MoE layer's expert math at decode time, in layouts that can be swapped and compared.

Start at `api.py` (what a user calls), `reference.py` (what it means) and `layouts.py`.
"""

from pallas_kernels.decode_experts.api import decode_experts
from pallas_kernels.decode_experts.choice import MODES, LayoutChoice, choose_layout
from pallas_kernels.decode_experts.expert_major import Config as ExpertMajorConfig
from pallas_kernels.decode_experts.layouts import LAYOUTS
from pallas_kernels.decode_experts.output_major import Config as OutputMajorConfig
from pallas_kernels.decode_experts.reference import reference_experts
from pallas_kernels.decode_experts.weights import ExpertShapes, ExpertWeights

__all__ = [
    "LAYOUTS",
    "MODES",
    "ExpertMajorConfig",
    "ExpertShapes",
    "ExpertWeights",
    "LayoutChoice",
    "OutputMajorConfig",
    "choose_layout",
    "decode_experts",
    "reference_experts",
]
