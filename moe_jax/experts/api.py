"""experts: the one function through which every MoE layer computes its experts."""

import contextlib
import contextvars
import functools
import os
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from moe_jax.activations import ACTIVATIONS
from moe_jax.experts.backend import PHASES, Asked, Backend
from moe_jax.experts.extras import SharedExperts, check_extras, with_extras
from moe_jax.experts.grouped import grouped_experts
from moe_jax.experts.kernels import kernel_experts
from moe_jax.experts.portable import portable_experts
from moe_jax.experts.table import BackendChoice, choose_backend
from moe_jax.platforms import has_all_of_xla, resolve_platform
from pallas_kernels.decode_experts import ExpertWeights, reference_experts

BACKEND_VARIABLE = "MOE_JAX_EXPERTS_BACKEND"


def _reference(x, weights, ids, expert_weights, activation):
    run = functools.partial(reference_experts, activation=ACTIVATIONS[activation])
    return run(x, weights, ids, expert_weights)


# Of two products' roundings to bf16, of the output's, and of those around latent projections.
_XLA_ERROR = {"float32": 1e-5, "bfloat16": 6e-3, "float16": 1e-3}
_KERNELS = {
    "rel_error": {"bfloat16": 6e-3},  # 1.8e-3 without latent projections and shared experts
    "activations": ("silu", "swish"),
    "size_multiple": 64,
}

BACKENDS: dict[str, Backend] = {
    "reference": Backend(
        run=with_extras(_reference, wide=True),
        what="float32, one token at a time: the definition",
        rel_error={"float32": 1e-5, "bfloat16": 2e-3, "float16": 3e-4},
    ),
    "portable": Backend(
        run=with_extras(portable_experts),
        what="plain XLA that any compiler takes: gathers experts, or multiplies all",
        rel_error=_XLA_ERROR,
    ),
    "grouped": Backend(
        run=with_extras(grouped_experts),
        what="XLA: sorts by expert, lax.ragged_dot_general",
        rel_error=_XLA_ERROR,
        platforms=("cpu", "cuda"),
    ),
    "pallas": Backend(
        run=with_extras(kernel_experts),
        what="the decode kernels of pallas_kernels, compiled; choose_layout picks the layout",
        platforms=("cuda",),
        **_KERNELS,
    ),
    "pallas_interpret": Backend(
        run=with_extras(functools.partial(kernel_experts, interpret=True)),
        what="the same kernels in Pallas's interpret mode: slow, for checking on a CPU",
        platforms=("cpu",),
        **_KERNELS,
    ),
}

# Temporaries on CUDA, in Qwen3-30B-A3B: XLA expands a grouped matmul to all experts and takes 3 GB
# for 512 tokens; the portable backend's product of all experts takes 1 GB for 1024.
_LARGEST_CHUNK = {("grouped", "cuda"): 512, ("portable", "cuda"): 1024}

_record: contextvars.ContextVar[list | None] = contextvars.ContextVar("record", default=None)


def experts(
    x: jax.Array,
    weights: ExpertWeights,
    ids: jax.Array,
    expert_weights: jax.Array,
    *,
    activation: str = "silu",
    fc1_latent_proj: jax.Array | None = None,
    fc2_latent_proj: jax.Array | None = None,
    shared_experts: SharedExperts | None = None,
    backend: str = "auto",
    platform: str | None = None,
    phase: str = "prefill",
    chunk: int | None = None,
) -> jax.Array:
    """out[t] = fc2 @ sum over k of w[t,k] * down_e(a(gate_e z_t) * up_e z_t) + shared(x_t).

    e = ids[t,k], z = fc1 @ x; without latent projections z is x and fc2 is not applied. The backend
    is chosen in Python, from shapes and names, when the call is traced.

    Args:
      x: [T, H].
      weights: gate_up [E, 2, I, L], down [E, L, I]; L is H without latent projections.
      ids: [T, K] int32; an id outside [0, E) is padding and contributes nothing. A row of nothing
        else gives zeros.
      expert_weights: [T, K] float32.
      activation: a, a name in ACTIVATIONS; the shared experts' too.
      fc1_latent_proj, fc2_latent_proj: [L, H] and [H, L], both or none.
      shared_experts: an MLP that every token goes through; it reads x, and is added last.
      backend: a name in BACKENDS, or "auto": the environment variable MOE_JAX_EXPERTS_BACKEND, and
        without that the table of moe_jax.experts.table.
      platform: what to choose for, as in moe_jax.platforms.resolve_platform.
      phase: "prefill", "decode" or "training", for the table.
      chunk: at most so many tokens at once, one chunk after the other; None for all, except where
        a backend would take too much memory.

    Returns:
      [T, H] in x's dtype.

    Raises:
      ValueError: no such backend or phase, a shape that does not fit, chunk is not positive.
      NotImplementedError: the backend cannot do this; the message says what and who can.
    """
    if phase not in PHASES:
        raise ValueError(f"phase is {phase!r}; expected one of {list(PHASES)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; expected None or at least 1 token")
    check_extras(x.shape[1], weights, fc1_latent_proj, fc2_latent_proj, shared_experts)
    E, _, I, width = weights.gate_up.shape
    T, K = ids.shape
    asked = Asked(
        platform=resolve_platform(platform),
        phase=phase,
        T=T,
        K=K,
        E=E,
        width=width,
        I=I,
        dtype=jnp.dtype(x.dtype).name,
        activation=activation,
        latent=fc1_latent_proj is not None,
        shared=shared_experts is not None,
        quantised=weights.gate_up_scale is not None or weights.down_scale is not None,
    )
    choice = resolve_backend(asked, backend)
    if _record.get() is not None:
        _record.get().append((asked, choice))

    def run(x, ids, expert_weights):
        return BACKENDS[choice.backend].run(
            x,
            weights,
            ids,
            expert_weights,
            activation=activation,
            fc1_latent_proj=fc1_latent_proj,
            fc2_latent_proj=fc2_latent_proj,
            shared_experts=shared_experts,
        )

    chunk = chunk or _LARGEST_CHUNK.get((choice.backend, asked.platform), T)
    if chunk >= T:
        return run(x, ids, expert_weights)
    if not has_all_of_xla(asked.platform):  # without a loop
        parts = [slice(first, first + chunk) for first in range(0, T, chunk)]
        return jnp.concatenate([run(x[p], ids[p], expert_weights[p]) for p in parts])
    return _in_chunks(run, chunk, x, ids, expert_weights)


def resolve_backend(
    asked: Asked, backend: str = "auto", *, environment: Mapping[str, str] = os.environ
) -> BackendChoice:
    """The backend that a call runs, and why.

    Args:
      asked: the call.
      backend: its argument.
      environment: where MOE_JAX_EXPERTS_BACKEND is looked up, if backend is "auto".

    Raises:
      ValueError: there is no such backend.
      NotImplementedError: it cannot do what is asked; the message names those that can.
    """
    source = "backend"
    if backend == "auto" and environment.get(BACKEND_VARIABLE):
        source, backend = BACKEND_VARIABLE, environment[BACKEND_VARIABLE]
    if backend == "auto":
        return choose_backend(asked, BACKENDS)
    if backend not in tuple(BACKENDS):
        raise ValueError(f"{source} is {backend!r}; expected 'auto' or one of {sorted(BACKENDS)}")
    lack = BACKENDS[backend].lacks(asked)
    if lack is not None:
        able = [name for name, other in BACKENDS.items() if other.lacks(asked) is None]
        who = f"{', '.join(able)} can" if able else "no backend can"
        raise NotImplementedError(f"experts backend {backend!r} does not do {lack}; {who}")
    return BackendChoice(backend, f"{source} says so")


@contextlib.contextmanager
def record_choices() -> Iterator[list[tuple[Asked, BackendChoice]]]:
    """Lists every call of `experts` that is traced inside the block, and what it chose.

    A compiled function that was traced before is not traced again, and adds nothing.
    """
    token = _record.set([])
    try:
        yield _record.get()
    finally:
        _record.reset(token)


def _in_chunks(run, chunk: int, x, ids, expert_weights) -> jax.Array:
    """One chunk of tokens after the other; the last is filled up with padding.

    A gradient computes each chunk anew, so that one chunk's intermediates are kept and not all.
    """
    T = x.shape[0]
    fill = -T % chunk

    def split(array, value):
        array = jnp.pad(array, ((0, fill), (0, 0)), constant_values=value)
        return array.reshape(-1, chunk, array.shape[1])

    chunks = split(x, 0), split(ids, -1), split(expert_weights, 0)
    outputs = jax.lax.map(jax.checkpoint(lambda arrays: run(*arrays)), chunks)
    return outputs.reshape(-1, x.shape[1])[:T]
