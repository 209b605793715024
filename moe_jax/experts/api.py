"""experts: the one function through which every MoE layer computes its experts."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.activations import ACTIVATIONS
from moe_jax.experts.backend import Backend
from moe_jax.experts.gather import gather_experts
from moe_jax.experts.grouped import grouped_experts
from pallas_kernels.decode_experts import ExpertWeights, decode_experts, reference_experts


def _reference(x, weights, ids, expert_weights, activation):
    run = functools.partial(reference_experts, activation=ACTIVATIONS[activation])
    return run(x, weights, ids, expert_weights).astype(x.dtype)


def _pallas(x, weights, ids, expert_weights, activation, *, interpret=False):
    del activation  # declared below
    return decode_experts(x, weights, ids, expert_weights, interpret=interpret)


_KERNELS = {
    "activations": ("silu", "swish"),
    "dtypes": ("bfloat16",),
    "size_multiple": 64,
    "gradients": False,
}

BACKENDS: dict[str, Backend] = {
    "reference": Backend(run=_reference, what="float32, one token at a time: the definition"),
    "gather": Backend(run=gather_experts, what="XLA: gathers each assignment's expert"),
    "grouped": Backend(run=grouped_experts, what="XLA: sorts by expert, lax.ragged_dot_general"),
    "pallas": Backend(
        run=_pallas,
        what="the decode kernels of pallas_kernels, compiled; choose_layout picks the layout",
        platforms=("cuda",),
        **_KERNELS,
    ),
    "pallas_interpret": Backend(
        run=functools.partial(_pallas, interpret=True),
        what="the same kernels in Pallas's interpret mode: slow, for checking on a CPU",
        platforms=("cpu",),
        **_KERNELS,
    ),
}

# Above this many tokens the decode kernels have not been measured.
_KERNELS_UP_TO = 64

# XLA expands a grouped matmul on CUDA to all experts: 2.95 GB of temporaries at 512 tokens of
# Qwen3-30B-A3B.
_LARGEST_CHUNK = {("grouped", "cuda"): 512}


class BackendChoice(NamedTuple):
    """A backend's name and why it was chosen."""

    backend: str
    why: str


def platform() -> str:
    """Where JAX computes by default: "cuda", or JAX's own name as in "cpu"."""
    name = jax.default_backend()
    return "cuda" if name == "gpu" and "NVIDIA" in jax.devices()[0].device_kind.upper() else name


def choose_backend(
    *, platform: str, decode: bool, T: int, K: int, E: int, kernels_lack: str | None
) -> BackendChoice:
    """Says which backend `backend="auto"` runs.

    Args:
      platform: as platform() returns it.
      decode: whether this is a decode step; prefill and training need speed over many tokens, and
        gradients.
      T, K, E: the step's tokens, experts a token, experts.
      kernels_lack: what of this step the kernels cannot do, in words; None if nothing.
    """
    if not decode:
        return BackendChoice("grouped", "prefill and training: each expert's tokens together")
    if platform == "cuda" and kernels_lack is None and T <= _KERNELS_UP_TO:
        return BackendChoice("pallas", f"decode on CUDA, T = {T} <= {_KERNELS_UP_TO}")
    why = f"the kernels lack {kernels_lack}" if kernels_lack else f"T = {T} > {_KERNELS_UP_TO}"
    if T * K < E:
        return BackendChoice("gather", f"{why}; T * K = {T * K} < E = {E}: few experts are read")
    return BackendChoice("grouped", f"{why}; T * K = {T * K} >= E = {E}: most experts are read")


def experts(
    x: jax.Array,
    weights: ExpertWeights,
    ids: jax.Array,
    expert_weights: jax.Array,
    *,
    activation: str = "silu",
    backend: str = "auto",
    decode: bool = False,
    chunk: int | None = None,
) -> jax.Array:
    """out[t] = sum over k of w[t,k] * down_e(a(gate_e x_t) * up_e x_t), e = ids[t,k].

    Args:
      x: [T, H].
      weights: gate_up [E, 2, I, H], down [E, H, I].
      ids: [T, K] int32; an id outside [0, E) is padding and contributes nothing.
      expert_weights: [T, K] float32.
      activation: a, a name in ACTIVATIONS.
      backend: a name in BACKENDS, or "auto" (choose_backend says which).
      decode: whether this is a decode step, for "auto".
      chunk: at most so many tokens at once, one chunk after the other; None for all, except where
        a backend would take too much memory.

    Returns:
      [T, H] in x's dtype.

    Raises:
      ValueError: no such backend, or chunk is not positive.
      NotImplementedError: the backend cannot do this; the message says what and who can.
    """
    if backend != "auto" and backend not in tuple(BACKENDS):
        raise ValueError(f"backend is {backend!r}; expected 'auto' or one of {sorted(BACKENDS)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; expected None or at least 1 token")
    E, _, I, H = weights.gate_up.shape
    T, K = ids.shape
    here = platform()
    step = {
        "activation": activation,
        "dtype": jnp.dtype(x.dtype).name,
        "sizes": (H, I),
        "platform": here,
    }
    if backend == "auto":
        lack = BACKENDS["pallas"].lacks(**step)
        backend = choose_backend(
            platform=here, decode=decode, T=T, K=K, E=E, kernels_lack=lack
        ).backend
    lack = BACKENDS[backend].lacks(**step)
    if lack is not None:
        able = [name for name, other in BACKENDS.items() if other.lacks(**step) is None]
        raise NotImplementedError(
            f"experts backend {backend!r} does not do {lack}; {', '.join(able)} can"
        )
    run = functools.partial(BACKENDS[backend].run, activation=activation)
    chunk = chunk or _LARGEST_CHUNK.get((backend, here), T)
    if chunk >= T:
        return run(x, weights, ids, expert_weights)
    return _in_chunks(run, chunk, x, weights, ids, expert_weights)


def _in_chunks(run, chunk: int, x, weights, ids, expert_weights) -> jax.Array:
    """One chunk of tokens after the other; the last is filled up with padding."""
    T = x.shape[0]
    fill = -T % chunk

    def split(array, value):
        array = jnp.pad(array, ((0, fill), (0, 0)), constant_values=value)
        return array.reshape(-1, chunk, array.shape[1])

    chunks = split(x, 0), split(ids, -1), split(expert_weights, 0)
    outputs = jax.lax.map(lambda chunk: run(chunk[0], weights, *chunk[1:]), chunks)
    return outputs.reshape(-1, x.shape[1])[:T]
