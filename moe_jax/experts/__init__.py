"""One MoE layer's experts: one function, several backends.

Start at `api.py`. Each backend is a file; `latent_and_shared.py` is what stands around all of them,
and `moe_jax/dispatch.py` chooses one.
"""

from moe_jax.experts.api import EXPERTS_BACKENDS, ExpertsRequest, experts
from moe_jax.experts.latent_and_shared import SharedExperts
from pallas_kernels.decode_experts import ExpertWeights

__all__ = ["EXPERTS_BACKENDS", "ExpertWeights", "ExpertsRequest", "SharedExperts", "experts"]
