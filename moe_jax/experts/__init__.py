"""One MoE layer's experts: one function, several backends, one table.

Start at `api.py`, then `table.py`; each backend is a file or, for the kernels, a few lines that
call them, and `extras.py` is what may stand around all of them.
"""

from moe_jax.experts.api import (
    BACKEND_VARIABLE,
    BACKENDS,
    experts,
    record_choices,
    resolve_backend,
)
from moe_jax.experts.backend import PHASES, Asked, Backend
from moe_jax.experts.extras import SharedExperts
from moe_jax.experts.table import RULES, BackendChoice, Rule, choose_backend
from pallas_kernels.decode_experts import ExpertWeights

__all__ = [
    "BACKENDS",
    "BACKEND_VARIABLE",
    "PHASES",
    "RULES",
    "Asked",
    "Backend",
    "BackendChoice",
    "ExpertWeights",
    "Rule",
    "SharedExperts",
    "choose_backend",
    "experts",
    "record_choices",
    "resolve_backend",
]
