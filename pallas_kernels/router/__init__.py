"""Which experts each token goes to, in one launch.

Start at `api.py` (what a user calls) and `reference.py` (what it means); `kernel.py` has the grid.
moe_jax does not call it yet, because the decode step will.
"""

from pallas_kernels.router.api import route_tokens
from pallas_kernels.router.reference import Route, reference_route_tokens

__all__ = ["Route", "reference_route_tokens", "route_tokens"]
