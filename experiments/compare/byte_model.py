"""How many bytes of expert weights a routing needs, and how long reading them takes at the least.

Two counts, and a bandwidth says which one it means:
  unique bytes      each expert that some token is routed to, once: what must be read;
  requested bytes   each (token, k) assignment's expert: what is read when nothing is shared.
Activations and routing are left out: at decode they are less than a hundredth of either.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.compare.routings import Routing
from pallas_kernels.decode_experts import ExpertShapes

_BYTES_OF_BF16 = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """The mean over routings: unique_experts (a count), unique_bytes and requested_bytes."""

    unique_experts: float
    unique_bytes: float
    requested_bytes: float


def expert_bytes(shapes: ExpertShapes) -> int:
    """Bytes of one expert's gate, up and down projections in bfloat16."""
    return 3 * shapes.H * shapes.I * _BYTES_OF_BF16


def traffic(routings: Sequence[Routing], shapes: ExpertShapes) -> Traffic:
    """Counts the routings that are timed; an id outside [0, E) is padding and reads nothing."""
    valid = _valid_ids(routings, shapes)
    unique = float(np.mean([np.unique(ids).size for ids in valid]))
    requested = float(np.mean([ids.size for ids in valid]))
    size = expert_bytes(shapes)
    return Traffic(
        unique_experts=unique, unique_bytes=unique * size, requested_bytes=requested * size
    )


def _valid_ids(routings: Sequence[Routing], shapes: ExpertShapes) -> list[np.ndarray]:
    """Each routing's ids that are not padding, flat."""
    return [r.expert_ids[(r.expert_ids >= 0) & (r.expert_ids < shapes.E)] for r in routings]


def expected_unique_experts(shapes: ExpertShapes, T: int) -> float:
    """E * (1 - (1 - K/E)^T): what uniform routing of T tokens touches on average."""
    return shapes.E * (1 - (1 - shapes.K / shapes.E) ** T)


def floor_us(unique_bytes: float, tbps: float) -> float:
    """Microseconds to read the unique bytes at a bandwidth in TB/s (1e12 bytes a second)."""
    return unique_bytes / (tbps * 1e6)


def bytes_before_reuse(routings: Sequence[Routing], num_layers: int, shapes: ExpertShapes) -> float:
    """The fewest bytes read between two reads of one expert, when step i runs layer i % num_layers.

    A step runs one routing; the steps repeat from the first routing on. Well above the L2 cache's
    size means that every read comes from memory. Infinite if no expert is read twice.
    """
    steps = [set(np.unique(ids).tolist()) for ids in _valid_ids(routings, shapes)]
    # Twice around, so that the reuse of the first steps by the next program is seen as well.
    cycle = [(index % num_layers, steps[index]) for index in range(len(steps))] * 2
    size = expert_bytes(shapes)
    last_read: dict[tuple[int, int], float] = {}
    read, fewest = 0.0, float("inf")
    for layer, experts in cycle:
        for expert in experts:
            if (layer, expert) in last_read:
                fewest = min(fewest, read - last_read[layer, expert])
        read += len(experts) * size
        for expert in experts:
            last_read[layer, expert] = read
    return fewest
