"""The same layer by others: plain XLA written in three ways, other projects' kernels.

Each takes x [T, H] bf16, the weights, expert_ids [T, K] and expert_weights [T, K] float32, all ids
in [0, E), and returns [T, H] in `out_dtype`. In XLA products take bf16 and accumulate in float32;
the intermediate is cast to bf16 for the second product. XLA may drop that cast where it fuses the
product: on a GPU xla_gather's error shows that it does.

Other projects' kernels are run where they can be imported. They read the stored weights as they
are: gate_up [E, 2, I, H] seen as [E, 2*I, H], down [E, H, I]. No library is asked to fall back: a
candidate that cannot run says so instead of timing another one.
"""

import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.timing import Chain, restarts_at
from moe_jax.experts.grouped import ROWS_BY_EXPERT
from pallas_kernels.decode_experts import ExpertShapes, ExpertWeights

Layer = Callable[[jax.Array, ExpertWeights, jax.Array, jax.Array], jax.Array]


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up in float32, cast to the bf16 that the next product takes."""
    return (jax.nn.silu(gate) * up).astype(jnp.bfloat16)


def xla_gather(x, weights, expert_ids, expert_weights, *, out_dtype=jnp.bfloat16):
    """Gathers the weights of each assignment's expert; asks for T * K experts' bytes."""
    gate_up = weights.gate_up[expert_ids]  # [T, K, 2, I, H]
    projected = jnp.einsum("th,tkjih->tkji", x, gate_up, preferred_element_type=jnp.float32)
    hidden = _swiglu(projected[:, :, 0], projected[:, :, 1])  # [T, K, I]
    down = weights.down[expert_ids]  # [T, K, H, I]
    outputs = jnp.einsum("tki,tkhi->tkh", hidden, down, preferred_element_type=jnp.float32)
    return jnp.sum(expert_weights[..., None] * outputs, axis=1).astype(out_dtype)


def grouped_matmul_layer(ragged_dot, x, weights, expert_ids, expert_weights, *, out_dtype):
    """Sorts the assignments by expert, two grouped products, back into order, combine.

    ragged_dot(rows [TK, in], weights [E, out, in], group_sizes [E]) -> [TK, out] float32.
    """
    E, _, I, H = weights.gate_up.shape
    T, K = expert_ids.shape
    flat = expert_ids.reshape(-1)  # [TK]
    order = jnp.argsort(flat)
    group_sizes = jnp.bincount(flat, length=E).astype(jnp.int32)
    projected = ragged_dot(x[order // K], weights.gate_up.reshape(E, 2 * I, H), group_sizes)
    hidden = _swiglu(projected[:, :I], projected[:, I:])  # [TK, I]
    outputs = ragged_dot(hidden, weights.down, group_sizes)  # [TK, H]
    in_order = outputs[jnp.argsort(order)].reshape(T, K, H)
    return jnp.sum(expert_weights[..., None] * in_order, axis=1).astype(out_dtype)


def xla_ragged(x, weights, expert_ids, expert_weights, *, out_dtype=jnp.bfloat16):
    """jax.lax.ragged_dot_general. On a GPU it may be a dense product over all experts: look."""

    def ragged_dot(rows, stored, group_sizes):
        return jax.lax.ragged_dot_general(
            rows, stored, group_sizes, ROWS_BY_EXPERT, preferred_element_type=jnp.float32
        )

    return grouped_matmul_layer(
        ragged_dot, x, weights, expert_ids, expert_weights, out_dtype=out_dtype
    )


def xla_dense(x, weights, expert_ids, expert_weights, *, out_dtype=jnp.bfloat16):
    """Every expert on every token; what was not routed is dropped by a select."""
    E = weights.gate_up.shape[0]
    projected = jnp.einsum("th,ejih->teji", x, weights.gate_up, preferred_element_type=jnp.float32)
    hidden = _swiglu(projected[:, :, 0], projected[:, :, 1])  # [T, E, I]
    outputs = jnp.einsum("tei,ehi->teh", hidden, weights.down, preferred_element_type=jnp.float32)
    chosen = expert_ids[:, :, None] == jnp.arange(E, dtype=jnp.int32)  # [T, K, E]
    weight = jnp.sum(jnp.where(chosen, expert_weights[:, :, None], 0), axis=1)  # [T, E]
    routed = jnp.any(chosen, axis=1)[:, :, None]
    return jnp.sum(jnp.where(routed, weight[:, :, None] * outputs, 0), axis=1).astype(out_dtype)


def bf16_rounding(x, weights, expert_ids, expert_weights, *, out_dtype=jnp.bfloat16):
    """What the usual kernels round on the way: for its error only, never timed.

    bf16 after the first product, after silu(gate) * up and after each weighted expert output: the
    combine reads those bf16 outputs and adds them in float32. Its error of 0.004 is what vLLM's
    Triton kernels measure. One token at a time, to gather little.
    """

    def one_token(token):
        x_t, ids, w = token  # [H], [K], [K]
        projected = jnp.einsum(
            "h,kjih->kji", x_t, weights.gate_up[ids], preferred_element_type=jnp.float32
        )
        projected = _round_to_bf16(projected)
        hidden = _round_to_bf16(jax.nn.silu(projected[:, 0]) * projected[:, 1])  # [K, I]
        outputs = jnp.einsum("ki,khi->kh", hidden, weights.down[ids].astype(jnp.float32))
        return jnp.sum(_round_to_bf16(w[:, None] * outputs), axis=0)  # [H]

    return jax.lax.map(one_token, (x, expert_ids, expert_weights)).astype(out_dtype)


def _round_to_bf16(value: jax.Array) -> jax.Array:
    """float32 rounded to bf16's 8 bits; a pair of casts would be optimised away by XLA."""
    return jax.lax.reduce_precision(value, exponent_bits=8, mantissa_bits=7)


XLA_BASELINES: dict[str, Layer] = {
    "xla_gather": xla_gather,
    "xla_ragged": xla_ragged,
    "xla_dense": xla_dense,
    "bf16_rounding": bf16_rounding,
}

# Emulations, run for their error alone.
ACCURACY_ONLY = ("bf16_rounding",)


def inspect_baseline(name: str, chain: Chain, T: int, shapes: ExpertShapes) -> dict[str, Any]:
    """What XLA made of a baseline, read off the compiled program, for the record.

    temporary_bytes, and for a ragged product whether it was made dense.
    """
    facts: dict[str, Any] = {"temporary_bytes": chain.temporary_bytes}
    if name == "xla_ragged":
        facts["dense_expansion"] = is_dense_expansion(chain.compiled.as_text(), T, shapes)
    return facts


def is_dense_expansion(text: str, T: int, shapes: ExpertShapes) -> bool:
    """Whether compiled HLO holds every assignment's row, or its product, once for each expert.

    XLA expands a ragged product by copying each of the T * K rows to its expert's place in a zero
    array with an expert dimension, and multiplying that by all experts' weights.
    """
    TK, E, H, I = T * shapes.K, shapes.E, shapes.H, shapes.I
    if E == 1:
        return False
    return any(re.search(rf"\[(?:{TK},{E}|{E},{TK}),{width}\]", text) for width in (H, I, 2 * I))


def missing(library: str) -> str:
    """Why a library cannot be used here, or the empty string."""
    if importlib.util.find_spec(library) is None:
        return f"{library} is not installed"
    on_gpu = jax.default_backend() == "gpu"
    if library == "vllm" and not on_gpu:
        return "vllm's kernels need a CUDA GPU"
    if library == "tokamax" and on_gpu and importlib.util.find_spec("jax_triton") is None:
        return "tokamax's Triton kernel needs jax_triton, which is not installed"
    return ""


def tokamax_layer(x, weights, expert_ids, expert_weights, *, out_dtype=jnp.bfloat16):
    """Two of tokamax's grouped products. Its Triton kernel is the one that takes [E, out, in]."""
    import tokamax

    implementation = "triton" if jax.default_backend() == "gpu" else "xla"

    def ragged_dot(rows, stored, group_sizes):
        return tokamax.ragged_dot_general(
            rows,
            stored,
            group_sizes=group_sizes,
            ragged_dot_dimension_numbers=ROWS_BY_EXPERT,
            preferred_element_type=jnp.float32,
            implementation=implementation,
        )

    return grouped_matmul_layer(
        ragged_dot, x, weights, expert_ids, expert_weights, out_dtype=out_dtype
    )


def _as_torch(array):
    import torch

    return torch.from_dlpack(jax.block_until_ready(jnp.asarray(array)))


def _vllm_layer(x, weights: ExpertWeights, expert_ids, expert_weights):
    """VLLM's fused_experts on torch tensors; bf16 out, which is all that it gives."""
    from vllm.model_executor.layers.fused_moe import fused_experts

    E, _, I, H = weights.gate_up.shape
    return fused_experts(
        x, weights.gate_up.view(E, 2 * I, H), weights.down, expert_weights, expert_ids
    )


def vllm_layer(x, weights, expert_ids, expert_weights, *, out_dtype=jnp.bfloat16):
    """The same on jax arrays, without a copy of the weights: for the error."""
    import torch

    with torch.inference_mode():
        y = _vllm_layer(
            _as_torch(x),
            jax.tree.map(_as_torch, weights),
            _as_torch(expert_ids),
            _as_torch(expert_weights),
        )
        torch.cuda.synchronize()
    return jnp.from_dlpack(y.contiguous()).astype(out_dtype)


class VllmChain:
    """timing.Chain of a layer, in torch: the steps are captured in one CUDA graph."""

    def __init__(self, x: jax.Array, inputs: Sequence[Any], restart_every: int):
        import torch

        self._torch = torch
        self.steps = len(inputs)
        tensors = [jax.tree.map(_as_torch, given) for given in inputs]
        start = _as_torch(x)

        def program():
            y, ends = start, []
            for step, given in enumerate(tensors):
                if restarts_at(step, restart_every):
                    ends.append(y)
                    y = start
                y = _vllm_layer(y, *given)
            return [*ends, y]

        with torch.inference_mode():
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # compiles the kernels before the capture
                program()
            torch.cuda.current_stream().wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._results = program()

    def enqueue(self) -> None:
        """Issues one run of all steps without waiting for it."""
        self._graph.replay()

    def wait(self) -> None:
        """Returns when everything issued has run."""
        self._torch.cuda.synchronize()

    def result(self):
        """The outputs before each restart and the last one, [restarts + 1, T, H] float32."""
        return self._torch.stack(self._results).float().cpu().numpy()
