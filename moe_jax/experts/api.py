"""experts: the one function through which every MoE layer computes its experts."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe_jax.activations import ACTIVATIONS
from moe_jax.dispatch import PHASES, Backend, Request, resolve_backend
from moe_jax.experts.exchange import experts_on_mesh
from moe_jax.experts.grouped import grouped_experts
from moe_jax.experts.grouped_pallas import grouped_pallas_experts
from moe_jax.experts.latent_and_shared import (
    SharedExperts,
    check_latent_and_shared,
    with_latent_and_shared,
)
from moe_jax.experts.pallas import pallas_experts
from moe_jax.experts.portable import portable_experts
from moe_jax.integers import int32_ids
from moe_jax.parallelism import Parallelism
from moe_jax.platforms import has_all_of_xla, resolve_platform
from pallas_kernels.block_scaled_fp8 import (
    BlockScaledFp8,
    Weight,
    check_block_scaled_fp8,
    dequantise,
)
from pallas_kernels.decode_experts import ExpertShapes, ExpertWeights, reference_experts
from pallas_kernels.grouped_matmul import SIZE_MULTIPLE, runs_on
from pallas_kernels.mosaic.device import device_kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsRequest(Request):
    """One call of `experts`, for moe_jax.dispatch.

    Attributes:
      K, E: experts of each token, experts in all.
      width: what the experts take: H, or L with latent projections.
      I: the experts' intermediate size.
      latent: whether there are latent projections.
      shared: whether there are shared experts.
      quantised: whether the experts' weights are BlockScaledFp8.
      whole_blocks: whether their blocks are of 128 x 128, and none is cut off.
      hopper: whether the GPU has Hopper's instructions, as far as its name says.
    """

    op: ClassVar[str] = "experts"
    K: int
    E: int
    width: int
    I: int
    activation: str = "silu"
    latent: bool = False
    shared: bool = False
    quantised: bool = False
    whole_blocks: bool = True
    hopper: bool = True

    @property
    def shapes(self) -> ExpertShapes:
        """The layer as the kernels see it."""
        weights = "fp8" if self.quantised else "bf16"
        return ExpertShapes(E=self.E, K=self.K, H=self.width, I=self.I, weights=weights)

    @property
    def sizes(self) -> dict[str, int]:
        return {"L" if self.latent else "H": self.width, "I": self.I}

    @property
    def features(self) -> tuple[str, ...]:
        asked = {
            _LATENT: self.latent,
            _SHARED: self.shared,
            _QUANTISED: self.quantised,
            _OTHER_BLOCKS: self.quantised and not self.whole_blocks,
            _OTHER_GPUS: self.platform == "cuda" and not self.hopper,
            _FEW: self.K > self.E,
        }
        return tuple(feature for feature, is_asked in asked.items() if is_asked)


_LATENT, _SHARED, _QUANTISED = "latent projections", "shared experts", "quantised weights"
_OTHER_BLOCKS = "FP8 weights in other blocks than whole ones of 128 x 128"
_OTHER_GPUS = "GPUs that are no Hopper"
_FEW = "more experts for a token than a shard has"


def _reference(x, weights, ids, expert_weights, activation):
    run = functools.partial(reference_experts, activation=ACTIVATIONS[activation])
    return run(x, weights, ids, expert_weights)


# The sum of what is rounded to bf16: two products, the output, and around latent projections.
_XLA_ERROR = {"float32": 1e-5, "bfloat16": 6e-3, "float16": 1e-3}
_AROUND = (_LATENT, _SHARED)  # with_latent_and_shared gives both to every backend
_PLAIN_XLA = (*_AROUND, _QUANTISED, _OTHER_BLOCKS, _OTHER_GPUS, _FEW)
_KERNELS = {
    "rel_error": {"bfloat16": 6e-3},  # 1.8e-3 without latent projections and shared experts
    "activations": ("silu", "swish"),
    "size_multiple": 64,
    "features": (*_AROUND, _QUANTISED, _OTHER_GPUS),
}
_GROUPED_KERNELS = {
    "rel_error": {"bfloat16": 6e-3},  # 2.8e-3 without latent projections and shared experts
    "activations": ("silu", "swish"),
    "size_multiple": SIZE_MULTIPLE,
    "features": (*_AROUND, _QUANTISED, _OTHER_BLOCKS, _FEW),
}

EXPERTS_BACKENDS: dict[str, Backend] = {
    "reference": Backend(
        run=with_latent_and_shared(_reference, wide=True),
        what="float32, one token at a time: the definition",
        rel_error={"float32": 1e-5, "bfloat16": 2e-3, "float16": 3e-4},
        features=_PLAIN_XLA,
    ),
    "portable": Backend(
        run=with_latent_and_shared(portable_experts),
        what="plain XLA that any compiler takes: gathers experts, or multiplies all",
        rel_error=_XLA_ERROR,
        features=_PLAIN_XLA,
    ),
    "grouped": Backend(
        run=with_latent_and_shared(grouped_experts),
        what="XLA: sorts by expert, lax.ragged_dot_general",
        rel_error=_XLA_ERROR,
        features=(*_AROUND, _OTHER_GPUS, _FEW),
        platforms=("cpu", "cuda"),
    ),
    "grouped_pallas": Backend(
        run=with_latent_and_shared(grouped_pallas_experts),
        what="sorts by expert, the grouped products of pallas_kernels, compiled; their gradients",
        platforms=("cuda",),
        **_GROUPED_KERNELS,
    ),
    "grouped_pallas_interpret": Backend(
        run=with_latent_and_shared(functools.partial(grouped_pallas_experts, interpret=True)),
        what="the same products in Pallas's interpret mode: slow, for checking on a CPU",
        platforms=("cpu",),
        **_GROUPED_KERNELS,
    ),
    "pallas": Backend(
        run=with_latent_and_shared(pallas_experts),
        what="the decode kernels of pallas_kernels, compiled; choose_layout picks the layout",
        platforms=("cuda",),
        **_KERNELS,
    ),
    "pallas_interpret": Backend(
        run=with_latent_and_shared(functools.partial(pallas_experts, interpret=True)),
        what="the same kernels in Pallas's interpret mode: slow, for checking on a CPU",
        platforms=("cpu",),
        **_KERNELS,
    ),
}

# Temporaries on CUDA, in Qwen3-30B-A3B: XLA expands a grouped matmul to all experts and takes 3 GB
# for 512 tokens; the portable backend's product of all experts takes 1 GB for 1024; sorted rows and
# their products take 2.6 GB for 32768.
_LARGEST_CHUNK = {
    ("grouped", "cuda"): 512,
    ("portable", "cuda"): 1024,
    ("grouped_pallas", "cuda"): 32768,
}


def experts(
    x: jax.Array,
    weights: ExpertWeights,
    ids: jax.Array,
    expert_weights: jax.Array,
    *,
    activation: str = "silu",
    fc1_latent_proj: Weight | None = None,
    fc2_latent_proj: Weight | None = None,
    shared_experts: SharedExperts | None = None,
    backend: str = "auto",
    platform: str | None = None,
    phase: str = "prefill",
    chunk: int | None = None,
    dequantize: bool = False,
    parallelism: Parallelism | None = None,
) -> jax.Array:
    """out[t] = fc2 @ sum over k of w[t,k] * down_e(a(gate_e z_t) * up_e z_t) + shared(x_t).

    e = ids[t,k], z = fc1 @ x; without latent projections z is x and fc2 is not applied. The backend
    is chosen in Python, from shapes and names, when the call is traced.

    Args:
      x: [T, H].
      weights: gate_up [E, 2, I, L], down [E, L, I]; L is H without latent projections. Any weight
        here may be a BlockScaledFp8; of the experts' two, both or none.
      ids: [T, K] of any integer dtype; an id outside [0, E) is padding and contributes nothing. A
        row of nothing else gives zeros.
      expert_weights: [T, K] of a floating dtype.
      activation: a, a name in ACTIVATIONS; the shared experts' too.
      fc1_latent_proj, fc2_latent_proj: [L, H] and [H, L], both or none.
      shared_experts: an MLP that every token goes through; it reads x, and is added last.
      backend: a name in EXPERTS_BACKENDS, or "auto": the environment variable
        MOE_JAX_EXPERTS_BACKEND, and without that the table of moe_jax.dispatch.
      platform: what to choose for, as in moe_jax.platforms.resolve_platform.
      phase: "prefill", "decode" or "training", for the table.
      chunk: the most tokens at once, one chunk after the other; None for all, except where a
        backend would take too much memory.
      dequantize: whether a backend without quantised weights may be given the experts' weights in
        x's dtype, all E of them: twice FP8's bytes beside it in bfloat16.
      parallelism: of the mesh whose device this runs on, inside jax.shard_map: x and ids are the
        device's, `weights` hold its shard, [E / n, 2, I / m, L], and the others' experts are added.

    Returns:
      [T, H] in x's dtype.

    Raises:
      ValueError: no such backend or phase, a shape that does not fit, chunk is not positive.
      TypeError: ids are not integers, or expert_weights not floating-point numbers.
      NotImplementedError: the backend cannot do this; the message says what and who can.
    """
    if phase not in PHASES:
        raise ValueError(f"phase is {phase!r}; expected one of {list(PHASES)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; expected None or at least 1 token")
    _check_shapes(x, weights, ids, expert_weights)
    check_latent_and_shared(x.shape[1], weights, fc1_latent_proj, fc2_latent_proj, shared_experts)
    E, _, I, width = weights.gate_up.shape
    T, K = ids.shape
    if parallelism is not None:
        return _on_mesh(
            x, weights, ids, expert_weights, parallelism, phase, resolve_platform(platform),
            {"backend": backend, "chunk": chunk, "dequantize": dequantize},
            activation=activation, fc1_latent_proj=fc1_latent_proj, fc2_latent_proj=fc2_latent_proj,
            shared_experts=shared_experts,
        )  # fmt: skip
    ids = int32_ids(ids, E)
    request = ExpertsRequest(
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
        quantised=weights.quantised and not dequantize,
        whole_blocks=weights.in_whole_blocks,
        hopper=runs_on(device_kind()),
    )
    choice = resolve_backend(request, EXPERTS_BACKENDS, backend)
    if weights.quantised and _QUANTISED not in EXPERTS_BACKENDS[choice.backend].features:
        weights = ExpertWeights(
            gate_up=dequantise(weights.gate_up, x.dtype), down=dequantise(weights.down, x.dtype)
        )

    def run(x, ids, expert_weights):
        return EXPERTS_BACKENDS[choice.backend].run(
            x,
            weights,
            ids,
            expert_weights,
            activation=activation,
            fc1_latent_proj=fc1_latent_proj,
            fc2_latent_proj=fc2_latent_proj,
            shared_experts=shared_experts,
        )

    chunk = chunk or _LARGEST_CHUNK.get((choice.backend, request.platform), T)
    if chunk >= T:
        return run(x, ids, expert_weights)
    if not has_all_of_xla(request.platform):  # without a loop
        parts = [slice(first, first + chunk) for first in range(0, T, chunk)]
        return jnp.concatenate([run(x[p], ids[p], expert_weights[p]) for p in parts])
    return _in_chunks(run, chunk, x, ids, expert_weights)


def _on_mesh(
    x, weights, ids, expert_weights, parallelism: Parallelism, phase, platform, how, **around
) -> jax.Array:
    """The experts of all shards; each shard's are `experts` of what it has."""
    E = weights.gate_up.shape[0] * parallelism.size("expert")
    mesh = {"parallelism": parallelism, "phase": phase, "platform": platform}
    one_shard = functools.partial(experts, phase=phase, platform=platform, **how)
    run = with_latent_and_shared(functools.partial(experts_on_mesh, one_shard, E=E, **mesh))
    return run(x, weights, int32_ids(ids, E), expert_weights, num_experts=E, **around)


def _check_shapes(x, weights: ExpertWeights, ids, expert_weights) -> None:
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [T, H]")
    if ids.ndim != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(f"ids has shape {tuple(ids.shape)}; expected [T, K] with T = {x.shape[0]}")
    if expert_weights.shape != ids.shape:
        raise ValueError(
            f"expert_weights has shape {tuple(expert_weights.shape)}; expected {tuple(ids.shape)}, "
            "as ids"
        )
    for name, array, kind in (
        ("ids", ids, jnp.integer),
        ("expert_weights", expert_weights, jnp.floating),
    ):
        if not jnp.issubdtype(array.dtype, kind):
            raise TypeError(f"{name} has dtype {array.dtype}; expected {kind.__name__} values")
    if weights.gate_up.ndim != 4 or weights.gate_up.shape[1] != 2:
        raise ValueError(
            f"weights.gate_up has shape {tuple(weights.gate_up.shape)}; expected [E, 2, I, L]"
        )
    E, _, I, width = weights.gate_up.shape
    if weights.down.shape != (E, width, I):
        raise ValueError(
            f"weights.down has shape {tuple(weights.down.shape)}; expected [E, L, I] = "
            f"{(E, width, I)}"
        )
    for name, weight in (("gate_up", weights.gate_up), ("down", weights.down)):
        if isinstance(weight, BlockScaledFp8):
            check_block_scaled_fp8(f"weights.{name}", weight)
        elif weights.quantised:
            raise TypeError(
                f"weights.{name} is {weight.dtype}; expected BlockScaledFp8, as the other weight is"
            )


def _in_chunks(run, chunk: int, x, ids, expert_weights) -> jax.Array:
    """One chunk of tokens after the other; the last is filled up with padding.

    A gradient computes each chunk anew, because then the intermediates of one chunk are kept at a
    time.
    """
    T = x.shape[0]
    fill = -T % chunk

    def split(array, value):
        array = jnp.pad(array, ((0, fill), (0, 0)), constant_values=value)
        return array.reshape(-1, chunk, array.shape[1])

    chunks = split(x, 0), split(ids, -1), split(expert_weights, 0)
    outputs = jax.lax.map(jax.checkpoint(lambda arrays: run(*arrays)), chunks)
    return outputs.reshape(-1, x.shape[1])[:T]
