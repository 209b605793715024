"""Traces: the experts that a run chose in each layer; to store, to replay, to compare layouts."""

import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.routing import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingTrace:
    """The experts of N tokens in each MoE layer.

    Attributes:
      expert_ids: [layers, N, K] int32; -1 where a token was padding.
      expert_weights: [layers, N, K] float32, or None.
    """

    expert_ids: jax.Array
    expert_weights: jax.Array | None = None

    def layer(self, index: int) -> "RoutingTrace":
        """One layer's, without the layer axis: what SparseMoe replays."""
        weights = self.expert_weights
        return RoutingTrace(
            expert_ids=self.expert_ids[index],
            expert_weights=None if weights is None else weights[index],
        )


def trace_of(routings: Sequence[Routing]) -> RoutingTrace:
    """The trace of one model call, from its output's `routings` (ask for output_routings=True)."""
    return RoutingTrace(
        expert_ids=jnp.stack([routing.ids for routing in routings]),
        expert_weights=jnp.stack([routing.weights for routing in routings]),
    )


def join_traces(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """Several calls' traces as one: their tokens one after the other.

    Raises:
      ValueError: some have weights and some have none, or layers or K differ.
    """
    if len({trace.expert_weights is None for trace in traces}) > 1:
        raise ValueError("expert_weights is None in some of the traces; expected in all or in none")
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=1), *traces)


def drop_padding(trace: RoutingTrace) -> RoutingTrace:
    """The trace without tokens that any layer routed nowhere; on concrete arrays only."""
    kept = np.all(np.asarray(trace.expert_ids) >= 0, axis=(0, 2))
    return jax.tree.map(lambda array: array[:, kept], trace)


def save_trace(path: str | pathlib.Path, trace: RoutingTrace) -> None:
    """Writes an .npz that load_trace and compare_layouts' --routing=trace:PATH read.

    The file appears whole or not at all.
    """
    arrays = {"expert_ids": _as_int32(np.asarray(trace.expert_ids))}
    if trace.expert_weights is not None:
        arrays["expert_weights"] = np.asarray(trace.expert_weights, np.float32)
    save_arrays(pathlib.Path(path), arrays)


def save_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz of arrays by name, which appears whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            np.savez_compressed(file, **arrays)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_trace(path: str | pathlib.Path) -> RoutingTrace:
    """Reads what save_trace wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no .npz of a trace; the message names the file, the field and its shape.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            ids = archive["expert_ids"]
            weights = archive["expert_weights"] if "expert_weights" in archive.files else None
    except FileNotFoundError:
        raise
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, TypeError) as error:
        raise ValueError(f"{path} is no .npz file with a field `expert_ids`: {error}") from error
    if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{path}: expert_ids has shape {ids.shape} and dtype {ids.dtype}; expected "
            "[layers, N, K] integers"
        )
    if weights is not None:
        if weights.shape != ids.shape:
            raise ValueError(
                f"{path}: expert_weights has shape {weights.shape}; expected {ids.shape}, as "
                "expert_ids"
            )
        if not np.issubdtype(weights.dtype, np.floating):
            raise ValueError(
                f"{path}: expert_weights has dtype {weights.dtype}; expected floating-point numbers"
            )
    return RoutingTrace(
        expert_ids=jnp.asarray(_as_int32(ids)),
        expert_weights=None if weights is None else jnp.asarray(weights, jnp.float32),
    )


def _as_int32(ids: np.ndarray) -> np.ndarray:
    """What does not fit is padding in any dtype, and is so afterwards: no id may wrap around."""
    return np.clip(ids, -1, np.iinfo(np.int32).max).astype(np.int32)
