"""Other projects' kernels for the same layer, where they can be imported.

Both read the stored weights as they are: gate_up [E, 2, I, H] seen as [E, 2*I, H], down [E, H, I].
No library is asked to fall back: a candidate that cannot run says so instead of timing another one.
"""

import importlib.util
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from experiments.compare.baselines import grouped_matmul_layer
from experiments.compare.routings import Routing
from experiments.compare.timing import restarts_at
from moe_jax.experts.grouped import ROWS_BY_EXPERT
from pallas_kernels.decode_experts import ExpertWeights


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
    """The chain of timing.JaxChain in torch: `steps` layers captured in one CUDA graph."""

    def __init__(
        self,
        layers: Sequence[ExpertWeights],
        routings: Sequence[Routing],
        x: jax.Array,
        steps: int,
    ):
        import torch

        self._torch = torch
        self.steps = steps
        tensors = [jax.tree.map(_as_torch, layer) for layer in layers]
        routed = [tuple(_as_torch(field) for field in routing) for routing in routings]
        start = _as_torch(x)

        def program():
            y, ends = start, []
            for step in range(steps):
                if restarts_at(step):
                    ends.append(y)
                    y = start
                ids, weights = routed[step % len(routed)]
                y = _vllm_layer(y, tensors[step % len(tensors)], ids, weights)
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
