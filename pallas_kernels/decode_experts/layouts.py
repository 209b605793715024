"""The layouts by name: a layout joins by its line here."""

from pallas_kernels.decode_experts.configs import Layout
from pallas_kernels.decode_experts.expert_major import EXPERT_MAJOR
from pallas_kernels.decode_experts.output_major import OUTPUT_MAJOR

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (OUTPUT_MAJOR, EXPERT_MAJOR)}
