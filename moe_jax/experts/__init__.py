"""One MoE layer's experts: one function, several backends, one table.

Start at `api.py`; each backend is a file or, for the kernels, a few lines that call them.
"""

from moe_jax.experts.api import BACKENDS, BackendChoice, choose_backend, experts
from moe_jax.experts.backend import Backend
from pallas_kernels.decode_experts import ExpertWeights

__all__ = ["BACKENDS", "Backend", "BackendChoice", "ExpertWeights", "choose_backend", "experts"]
