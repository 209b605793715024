"""A decoder layer's decode step, in as few launches as pay.

Start at `api.py` (what a user calls) and `reference.py` (what it means); `layer.py` has the list of
tasks, and `tasks.py` runs such a list.
"""

from pallas_kernels.decode_step.api import decode_layer, decode_layers, stamp_layers
from pallas_kernels.decode_step.layer_arrays import (
    LayerShard,
    LayerStep,
    LayerWeights,
    Residual,
    RowPositions,
)
from pallas_kernels.decode_step.reference import reference_decode_layer

__all__ = [
    "LayerShard",
    "LayerStep",
    "LayerWeights",
    "Residual",
    "RowPositions",
    "decode_layer",
    "decode_layers",
    "reference_decode_layer",
    "stamp_layers",
]
