"""Which experts each token is sent to, and how many bytes of weights that needs.

uniform      every expert is equally likely
zipf         the expert of rank r has odds 1 / r; which expert has which rank is drawn anew
balanced     every expert has as many tokens as the others, or one fewer; drawn anew
hotspot      one expert in sixteen (at least one) has 16 times the odds of the others
one_expert   every k of every token names one and the same expert
trace:FILE   FILE.npz holds `expert_ids`, [N, K] or [layers, N, K] integers; rows are drawn from it

Bytes are counted in two ways, and a bandwidth says which one it means:
  unique bytes      each expert that some token is routed to, once: what must be read;
  requested bytes   each (token, k) assignment's expert: what is read when nothing is shared.
Activations and routing are left out: at decode they are less than a hundredth of either.
"""

import dataclasses
import math
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pallas_kernels.block_scaled_fp8 import scales_shape
from pallas_kernels.decode_experts import ExpertShapes

MADE_UP = ("uniform", "balanced", "zipf", "hotspot", "one_expert")
ACCEPTED = f"{', '.join(MADE_UP)} or trace:FILE.npz"
_TRACE_PREFIX = "trace:"


class DrawnRouting(NamedTuple):
    """expert_ids [T, K] int32 and expert_weights [T, K] float32, each row of which sums to 1."""

    expert_ids: np.ndarray
    expert_weights: np.ndarray


def make_routings(
    routing: str, shapes: ExpertShapes, T: int, count: int, seed: int
) -> list[DrawnRouting]:
    """Draws `count` routings of T tokens; the same arguments give the same routings.

    Raises:
      ValueError: `routing` is not accepted, or its trace file cannot be used.
    """
    trace = None
    if routing.startswith(_TRACE_PREFIX):
        trace = read_trace_ids(routing.removeprefix(_TRACE_PREFIX), shapes)
    elif routing not in MADE_UP:
        raise ValueError(f"routing is {routing!r}; expected {ACCEPTED}")
    routings = []
    for index in range(count):
        rng = np.random.default_rng([seed, T, index])
        if trace is not None:
            ids = _draw_from_trace(rng, trace[index % len(trace)], T)
        elif routing == "one_expert":
            ids = np.full((T, shapes.K), rng.integers(shapes.E))
        elif routing == "balanced":
            ids = _deal(rng, T, shapes.K, shapes.E)
        else:
            ids = _draw_distinct(rng, _log_odds(rng, routing, shapes.E), T, shapes.K)
        routings.append(DrawnRouting(ids.astype(np.int32), _softmax_of_noise(rng, T, shapes.K)))
    return routings


def _deal(rng: np.random.Generator, T: int, K: int, E: int) -> np.ndarray:
    """[T, K]: shuffled experts, dealt out K a token; a pack lasts until no card is left over.

    E = 4, K = 3: four tokens take a shuffled pack three times over, 2 0 3 | 1 2 0 | 3 1 2 | 0 3 1.
    """
    tokens = E // math.gcd(E, K)  # of one pack
    packs = rng.permuted(np.tile(np.arange(E), (-(-T // tokens), 1)), axis=1)
    return packs[:, np.arange(tokens * K) % E].reshape(-1, K)[:T]


def _log_odds(rng: np.random.Generator, routing: str, E: int) -> np.ndarray:
    """[E]: the logarithm of each expert's odds."""
    if routing == "uniform":
        return np.zeros(E)
    shuffled = rng.permutation(E)
    if routing == "zipf":
        return -np.log1p(shuffled)
    return np.where(shuffled < max(1, E // 16), np.log(16.0), 0.0)


def _draw_distinct(rng: np.random.Generator, log_odds: np.ndarray, T: int, K: int) -> np.ndarray:
    """[T, K]: K distinct experts a token. Gumbel noise turns the odds into draws without return."""
    noisy = log_odds + rng.gumbel(size=(T, log_odds.size))
    return np.argsort(-noisy, axis=1)[:, :K]


def _draw_from_trace(rng: np.random.Generator, rows: np.ndarray, T: int) -> np.ndarray:
    """[T, K] of rows [N, K]; a row comes up twice only if the trace has fewer than T."""
    return rows[rng.choice(len(rows), size=T, replace=len(rows) < T)]


def _softmax_of_noise(rng: np.random.Generator, T: int, K: int) -> np.ndarray:
    """[T, K] float32: routing weights as a softmax router makes them, largest first."""
    odds = np.exp(-np.sort(-rng.normal(size=(T, K)), axis=1))
    return (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)


def read_trace_ids(path: str, shapes: ExpertShapes) -> np.ndarray:
    """Reads a trace file as [layers, N, K] int64.

    Raises:
      ValueError: the file or its `expert_ids` is missing, malformed or made for other sizes.
    """
    where = f"routing trace:{path}"
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with archive:
            names = archive.files
            ids = archive["expert_ids"] if "expert_ids" in names else None
    except FileNotFoundError:
        raise ValueError(f"{where}: there is no such file") from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{where} cannot be read as an .npz file of arrays: {error}") from None
    if ids is None:
        raise ValueError(f"{where} holds {names}; expected a field `expert_ids`")
    field = f"{where}: expert_ids"
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{field} has dtype {ids.dtype}; expected integers")
    if ids.ndim not in (2, 3) or 0 in ids.shape:
        raise ValueError(f"{field} has shape {ids.shape}; expected [N, K] or [layers, N, K]")
    if ids.shape[-1] != shapes.K:
        raise ValueError(f"{field} has K = {ids.shape[-1]}; the preset has K = {shapes.K}")
    if ids.min() < 0 or ids.max() >= shapes.E:
        raise ValueError(
            f"{field} has ids from {ids.min()} to {ids.max()}; expected ids in [0, {shapes.E})"
        )
    return ids.astype(np.int64).reshape(-1, *ids.shape[-2:])


def short_name(routing: str) -> str:
    """The routing's name in a record: a trace without its folder and suffix."""
    if not routing.startswith(_TRACE_PREFIX):
        return routing
    file = routing.removeprefix(_TRACE_PREFIX).replace("\\", "/").rsplit("/", 1)[-1]
    return _TRACE_PREFIX + file.removesuffix(".npz")


def of_first_shard(routings: Sequence[DrawnRouting], E: int) -> list[DrawnRouting]:
    """The routings as the shard of the experts 0 to E - 1 sees them: other experts' ids are -1."""
    return [
        routing._replace(
            expert_ids=np.where(routing.expert_ids < E, routing.expert_ids, -1).astype(np.int32)
        )
        for routing in routings
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """The mean over routings: unique_experts (a count), unique_bytes and requested_bytes."""

    unique_experts: float
    unique_bytes: float
    requested_bytes: float


def expert_bytes(shapes: ExpertShapes) -> int:
    """Bytes of one expert's gate, up and down projections; in FP8 with their float32 scales."""
    values = 3 * shapes.H * shapes.I
    if shapes.weights == "bf16":
        return 2 * values
    return values + 3 * 4 * math.prod(scales_shape((shapes.H, shapes.I)))


def traffic(routings: Sequence[DrawnRouting], shapes: ExpertShapes) -> Traffic:
    """Counts the routings that are timed; an id outside [0, E) is padding and reads nothing."""
    valid = _valid_ids(routings, shapes)
    unique = float(np.mean([np.unique(ids).size for ids in valid]))
    requested = float(np.mean([ids.size for ids in valid]))
    size = expert_bytes(shapes)
    return Traffic(
        unique_experts=unique, unique_bytes=unique * size, requested_bytes=requested * size
    )


def _valid_ids(routings: Sequence[DrawnRouting], shapes: ExpertShapes) -> list[np.ndarray]:
    """Each routing's ids that are not padding, flat."""
    return [r.expert_ids[(r.expert_ids >= 0) & (r.expert_ids < shapes.E)] for r in routings]


def expected_unique_experts(shapes: ExpertShapes, T: int) -> float:
    """E * (1 - (1 - K/E)^T): what uniform routing of T tokens touches on average."""
    return shapes.E * (1 - (1 - shapes.K / shapes.E) ** T)


def floor_us(unique_bytes: float, tbps: float) -> float:
    """Microseconds to read the unique bytes at a bandwidth in TB/s (1e12 bytes a second)."""
    return unique_bytes / (tbps * 1e6)


def bytes_before_reuse(
    routings: Sequence[DrawnRouting], num_layers: int, shapes: ExpertShapes
) -> float:
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
