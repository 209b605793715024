"""Which experts each token is sent to: made-up routings, or rows of a recorded trace.

uniform      every expert is equally likely
zipf         the expert of rank r has odds 1 / r; which expert has which rank is drawn anew
hotspot      one expert in sixteen (at least one) has 16 times the odds of the others
one_expert   every k of every token names one and the same expert
trace:FILE   FILE.npz holds `expert_ids`, [N, K] or [layers, N, K] integers; rows are drawn from it
"""

import zipfile
from typing import NamedTuple

import numpy as np

from pallas_kernels.decode_experts import ExpertShapes

MADE_UP = ("uniform", "zipf", "hotspot", "one_expert")
ACCEPTED = f"{', '.join(MADE_UP)} or trace:FILE.npz"
_TRACE_PREFIX = "trace:"


class Routing(NamedTuple):
    """expert_ids [T, K] int32 and expert_weights [T, K] float32, each row of which sums to 1."""

    expert_ids: np.ndarray
    expert_weights: np.ndarray


def make_routings(
    routing: str, shapes: ExpertShapes, T: int, count: int, seed: int
) -> list[Routing]:
    """Draws `count` routings of T tokens; the same arguments give the same routings.

    Raises:
      ValueError: `routing` is not accepted, or its trace file cannot be used.
    """
    trace = None
    if routing.startswith(_TRACE_PREFIX):
        trace = load_trace(routing.removeprefix(_TRACE_PREFIX), shapes)
    elif routing not in MADE_UP:
        raise ValueError(f"--routing is {routing!r}; expected {ACCEPTED}")
    routings = []
    for index in range(count):
        rng = np.random.default_rng([seed, T, index])
        if trace is not None:
            ids = _draw_from_trace(rng, trace[index % len(trace)], T)
        elif routing == "one_expert":
            ids = np.full((T, shapes.K), rng.integers(shapes.E))
        else:
            ids = _draw_distinct(rng, _log_odds(rng, routing, shapes.E), T, shapes.K)
        routings.append(Routing(ids.astype(np.int32), _softmax_of_noise(rng, T, shapes.K)))
    return routings


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


def load_trace(path: str, shapes: ExpertShapes) -> np.ndarray:
    """Reads a trace file as [layers, N, K] int64.

    Raises:
      ValueError: the file or its `expert_ids` is missing, malformed or made for other sizes.
    """
    where = f"--routing=trace:{path}"
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


def slug(routing: str) -> str:
    """The routing as a part of a file name."""
    if not routing.startswith(_TRACE_PREFIX):
        return routing
    stem = routing.removeprefix(_TRACE_PREFIX).replace("\\", "/").rsplit("/", 1)[-1]
    return "trace_" + "".join(c if c.isalnum() else "_" for c in stem.removesuffix(".npz"))
