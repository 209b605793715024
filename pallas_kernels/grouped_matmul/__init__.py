"""Each expert's rows multiplied together, in kernels: for prefill and training.

Start at `api.py` (what a user calls), `groups.py` (where the rows lie) and `reference.py` (what the
products mean).
"""

from pallas_kernels.grouped_matmul.api import (
    combine_rows,
    gather_rows,
    gather_weights,
    grouped_matmul,
    grouped_swiglu,
    runs_on,
)
from pallas_kernels.grouped_matmul.groups import GroupedAssignments, Groups, group_assignments
from pallas_kernels.grouped_matmul.reference import reference_grouped_matmul
from pallas_kernels.grouped_matmul.tiles import SIZE_MULTIPLE, GroupedMatmulConfig

__all__ = [
    "SIZE_MULTIPLE",
    "GroupedAssignments",
    "GroupedMatmulConfig",
    "Groups",
    "combine_rows",
    "gather_rows",
    "gather_weights",
    "group_assignments",
    "grouped_matmul",
    "grouped_swiglu",
    "reference_grouped_matmul",
    "runs_on",
]
