"""The router in one grid: RMSNorm, logits, softmax and top-k.

    norm      block t        normed[t] = RMSNorm of x[t], if asked for
    logits    block (split of H, 64 experts)
                             partials[split] = gate[64 experts, split] x[:, split]
    top-k     block t        logits[t] = partials added in order, softmax, top-k    (top_k.py)

Blocks are numbered in this order. Each has one task, and waits for lower-numbered blocks only
(mosaic/grid_sync.py): logits for all of norm, top-k for all of logits. The gate comes from memory,
512 KB for E = 128 and H = 2048, so each block of logits starts its copies of the gate before it
waits for the norm.

H is split because many blocks then read the gate at once, and each of them reads few columns of x.
The price is the partials, which stay in L2. The splits depend on H alone, so a token's logits have
the same bits in every batch.

A few tokens are too few rows for the tensor cores' M = 64, so the product is turned around
("swap-AB"): 64 experts are rows, the tokens are N columns. Columns do not mix.

With H = 2048, E = 128, T = 8 and a norm:

    block 0 to 7      norm of token 0 to 7
    block 8, 9, 10    split 0 of experts 0 to 63; split 0 of experts 64 to 127; split 1 of 0 to 63
    block 71          split 31 of experts 64 to 127
    block 72 to 79    top-k of token 0 to 7
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.device import launch
from pallas_kernels.mosaic.grid_sync import signal, wait, zeroed_counters
from pallas_kernels.mosaic.operands import copy_ragged_rows, ragged_wgmma_operand, wgmma_operand
from pallas_kernels.mosaic.warpgroup import row_layout
from pallas_kernels.router.reference import Route
from pallas_kernels.router.top_k import TopK, padded_experts, round_up

_BLOCK_M = 64  # experts of a task: the rows that one wgmma takes
_BLOCK_K = 64  # columns of a stage: 128 bytes of bf16, the swizzle's width
_MAX_SPLITS = 32

# The counters: norm's blocks that are done, and those of logits.
_NORMED, _MULTIPLIED = range(2)


def launch_router(
    x: jax.Array,
    gate: jax.Array,
    norm_weight: jax.Array | None,
    *,
    K: int,
    norm_topk_prob: bool,
    norm_eps: float,
    interpret: Any,
) -> Route:
    """route_tokens on checked inputs."""
    (T, H), E = x.shape, gate.shape[0]
    norm = None if norm_weight is None else TokenNorm(T=T, H=H, eps=norm_eps)
    product = SplitLogits(T=T, H=H, E=E)
    top_k = TopK(E=E, K=K, num_splits=product.num_splits, norm_topk_prob=norm_topk_prob)

    def kernel(
        block_id, x, gate, norm_weight, counters, normed, partials, logits, ids, weights,
        *, stages, full, shared,
    ):  # fmt: skip
        if norm:

            @pl.when(block_id < T)
            def _():
                norm.run(block_id, x, norm_weight, normed)
                signal(counters, _NORMED)

            block_id -= T

        def wait_for_norm():
            if norm:
                wait(counters, _NORMED, T, product.num_blocks)

        @pl.when((block_id >= 0) & (block_id < product.num_blocks))
        def _():
            tokens = normed if norm else x
            product.run(block_id, gate, tokens, partials, stages, full, wait_for_norm)
            signal(counters, _MULTIPLIED)

        token = block_id - product.num_blocks

        @pl.when(token >= 0)
        def _():
            wait(counters, _MULTIPLIED, product.num_blocks, T)
            top_k.run(token, partials, logits, ids, weights, shared)

    @jax.custom_batching.sequential_vmap  # the counters are for one call at a time
    def call(x, gate, norm_weight):
        return launch(
            kernel,
            name="router",
            num_blocks=(T if norm else 0) + product.num_blocks + T,
            out_type=(norm.out_type if norm else None, product.out_type, *top_k.out_types(T)),
            scratch_types={
                "stages": product.stage_types(),
                "full": product.full_type(),
                "shared": top_k.shared_types(),
            },
            interpret=interpret,
        )(x, gate, norm_weight, zeroed_counters(2))

    normed, _, logits, ids, weights = call(x, gate, norm_weight)
    return Route(ids=ids, weights=weights, logits=logits, normed=normed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenNorm:
    """Block t: normed[t] = norm_weight * bf16(x[t] / rms(x[t])).

    The variance is float32, and the weight multiplies after rounding, as a model's RMSNorm does.
    """

    T: int
    H: int
    eps: float

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.T, self.H), jnp.bfloat16)

    def run(self, token, x, norm_weight, normed) -> None:
        """All of one block: a row of `normed` is what it writes."""

        def load(ref):
            row = plgpu.load(ref, layout=row_layout(self.H), optimized=False)
            return row.astype(jnp.float32)

        row, weight = load(x.at[token]), load(norm_weight)
        scale = lax.rsqrt(jnp.sum(row * row) / self.H + self.eps)
        rounded = (row * scale).astype(jnp.bfloat16).astype(jnp.float32)
        normed[token] = (weight * rounded).astype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitLogits:
    """Block (split, 64 experts): partials[split, t, e] = gate[e, split] tokens[t, split].

    A split is num_stages * 64 columns, and each stage is used once. H = 2112 is 33 times 64: 2
    stages, 17 splits. The last stage of the last split is past the end, so it is all zeros.
    """

    T: int
    H: int
    E: int

    @property
    def N(self) -> int:
        """Columns of the product: the tokens, and zeros."""
        return round_up(self.T, 8)

    @property
    def num_stages(self) -> int:
        return -(-(self.H // _BLOCK_K) // _MAX_SPLITS)

    @property
    def num_splits(self) -> int:
        return -(-(self.H // _BLOCK_K) // self.num_stages)

    @property
    def blocks_per_split(self) -> int:
        return -(-self.E // _BLOCK_M)

    @property
    def num_blocks(self) -> int:
        return self.num_splits * self.blocks_per_split

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        """Partials; columns from E on belong to no expert."""
        shape = (self.num_splits, self.N, padded_experts(self.E))
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def stage_types(self) -> tuple[Any, Any]:
        """Shared memory: the gate's stages and the tokens'."""
        gate = wgmma_operand(self.num_stages, _BLOCK_M, _BLOCK_K)
        return gate, ragged_wgmma_operand(self.num_stages, self.N)

    @property
    def stage_bytes(self) -> int:
        """Of all stages, in bf16."""
        return 2 * self.num_stages * (_BLOCK_M + self.N) * _BLOCK_K

    def full_type(self):
        return plgpu.Barrier(num_arrivals=2, num_barriers=self.num_stages)

    def run(
        self, block_id, gate, tokens, partials, stages, full,
        wait: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """All of one block: `partials` is what it writes.

        Args:
          block_id: among the blocks of this kind.
          gate: [E, H] bf16.
          tokens: [T, H] bf16.
          partials: see out_type.
          stages: see stage_types.
          full: see full_type.
          wait: once wait() returns, the tokens may be read.
        """
        gate_smem, tokens_smem = stages
        tiled, _ = tokens_smem
        split, part = block_id // self.blocks_per_split, block_id % self.blocks_per_split
        experts = pl.ds(part * _BLOCK_M, _BLOCK_M)

        def load_gate(columns, stage):
            plgpu.copy_gmem_to_smem(gate.at[experts, columns], gate_smem.at[stage], full.at[stage])

        def load_tokens(columns, stage):
            copy_ragged_rows(tokens, columns, tokens_smem, stage, full.at[stage])

        def load_all(load: Callable[[Any, int], None]) -> None:
            for stage in range(self.num_stages):
                step = split * self.num_stages + stage
                load(pl.ds(step * _BLOCK_K, _BLOCK_K), stage)

        def multiply(acc):
            for stage in range(self.num_stages):
                plgpu.barrier_wait(full.at[stage])
                plgpu.wgmma(acc, gate_smem.at[stage], tiled.at[stage].transpose((1, 0)))
            return acc[...]  # [_BLOCK_M, N]

        # The gate depends on no other block, so its copies are on their way before the wait.
        load_all(load_gate)
        wait()
        load_all(load_tokens)
        sums = pl.run_scoped(multiply, plgpu.ACC((_BLOCK_M, self.N), jnp.float32))
        out = partials.at[split, :, experts].transpose((1, 0))
        out[...] = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)
