"""Latent projections before and after the experts, shared experts beside them; both optional.

z = fc1 x                          [T, L]   where there is a latent size
y = experts of z, weighted         [T, L]
out = fc2 y + shared(x)            [T, H]   shared experts read x, not z, and are added last

A backend computes the experts in the middle; this file does the rest, so no backend can omit it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.activations import ACTIVATIONS
from moe_jax.products import einsum
from pallas_kernels.block_scaled_fp8 import Weight, dequantise
from pallas_kernels.decode_experts import ExpertWeights

# (x [T, H or L], weights, ids [T, K], expert_weights [T, K], activation) -> the same shape as x.
Core = Callable[[jax.Array, ExpertWeights, jax.Array, jax.Array, str], jax.Array]


class SharedExperts(NamedTuple):
    """The weights of the MLP that every token goes through; N is its width.

    Attributes:
      gate_proj: [N, H].
      up_proj: [N, H].
      down_proj: [H, N].
    """

    gate_proj: Weight
    up_proj: Weight
    down_proj: Weight


def check_latent_and_shared(
    H: int,
    weights: ExpertWeights,
    fc1_latent_proj: Weight | None,
    fc2_latent_proj: Weight | None,
    shared_experts: SharedExperts | None,
) -> None:
    """Raises a ValueError that names what does not fit x [T, H] and the experts' width."""
    width = weights.gate_up.shape[-1]
    if (fc1_latent_proj is None) != (fc2_latent_proj is None):
        given = "fc2_latent_proj" if fc1_latent_proj is None else "fc1_latent_proj"
        raise ValueError(f"only {given} is given; expected both latent projections or none")
    if fc1_latent_proj is None and width != H:
        raise ValueError(
            f"x has H = {H} and the experts take {width}; expected the same, or latent projections"
        )
    expected = {}
    if fc1_latent_proj is not None:
        expected["fc1_latent_proj"] = (fc1_latent_proj, "[L, H]", (width, H))
        expected["fc2_latent_proj"] = (fc2_latent_proj, "[H, L]", (H, width))
    if shared_experts is not None:
        N = shared_experts.gate_proj.shape[0]
        for name, letters, shape in (
            ("gate_proj", "[N, H]", (N, H)),
            ("up_proj", "[N, H]", (N, H)),
            ("down_proj", "[H, N]", (H, N)),
        ):
            array = getattr(shared_experts, name)
            expected[f"shared_experts.{name}"] = (array, letters, shape)
    for name, (array, letters, shape) in expected.items():
        if tuple(array.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(array.shape)}; expected {letters} = {shape}")


def with_latent_and_shared(core: Core, *, wide: bool = False) -> Callable[..., jax.Array]:
    """A backend's `run` from its experts alone.

    Args:
      core: the experts, of an x that is H or L wide.
      wide: whether everything is float32 until the last rounding; otherwise each product's result
        is rounded to x's dtype before the next product.
    """

    def run(
        x: jax.Array,
        weights: ExpertWeights,
        ids: jax.Array,
        expert_weights: jax.Array,
        *,
        activation: str,
        fc1_latent_proj: Weight | None = None,
        fc2_latent_proj: Weight | None = None,
        shared_experts: SharedExperts | None = None,
        num_experts: int | None = None,
    ) -> jax.Array:
        dtype = jnp.float32 if wide else x.dtype
        latent = fc1_latent_proj is not None
        if not latent and shared_experts is None:
            return core(x, weights, ids, expert_weights, activation).astype(x.dtype)
        E = num_experts or weights.gate_up.shape[0]  # a shard's weights are fewer
        inside = (ids >= 0) & (ids < E)
        # A row that is all padding may hold NaN, and comes out as zeros.
        rows = jnp.where(jnp.any(inside, axis=1, keepdims=True), x, 0).astype(dtype)
        z = rows
        if latent:
            z = einsum("th,lh->tl", rows, dequantise(fc1_latent_proj, dtype)).astype(dtype)
        out = core(z, weights, ids, expert_weights, activation).astype(dtype)
        if latent:
            out = einsum("tl,hl->th", out, dequantise(fc2_latent_proj, dtype))
        if shared_experts is not None:
            gate, up, down = (dequantise(weight, dtype) for weight in shared_experts)
            hidden = ACTIVATIONS[activation](einsum("th,nh->tn", rows, gate))
            hidden = (hidden * einsum("th,nh->tn", rows, up)).astype(dtype)
            out = out.astype(jnp.float32) + einsum("tn,hn->th", hidden, down)
        return out.astype(x.dtype)

    return run
