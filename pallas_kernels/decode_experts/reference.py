"""What the op means, in plain jnp and float32: the oracle of every layout.

out[t] = sum over k of w[t,k] * down_e @ (silu(gate_e @ x_t) * (up_e @ x_t)),  e = ids[t,k]
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.block_scaled_fp8 import dequantise
from pallas_kernels.decode_experts.weights import ExpertWeights


def reference_experts(
    x: jax.Array,
    weights: ExpertWeights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
) -> jax.Array:
    """Computes one MoE layer's experts in float32, one token at a time.

    Every product runs at precision HIGHEST (on an NVIDIA GPU a float32 dot is TF32 otherwise), and
    only the routed experts of the token at hand are converted to float32, so that the memory used
    does not grow with T or with E.

    Args:
      x: [T, H], any float dtype.
      weights: gate_up [E, 2, I, H] and down [E, H, I], of any float dtype or BlockScaledFp8.
      expert_ids: [T, K] int32; an id outside [0, E) is padding and contributes nothing.
      expert_weights: [T, K] float32.
      activation: takes the place of silu.

    Returns:
      [T, H] float32; zeros for a row whose ids are all padding.
    """
    weights = jax.tree.map(jnp.asarray, weights)
    E = weights.gate_up.shape[0]
    highest = jax.lax.Precision.HIGHEST

    def one_token(token):
        x_t, ids, w = token  # [H], [K], [K]
        valid = (ids >= 0) & (ids < E)
        safe = jnp.where(valid, ids, 0)
        # Selected before the products too, so that NaN in padding reaches no gradient.
        x_t, w = jnp.where(jnp.any(valid), x_t, 0), jnp.where(valid, w, 0)
        routed = jax.tree.map(lambda array: array[safe], weights)
        gate_up = dequantise(routed.gate_up)  # [K, 2, I, H]
        down = dequantise(routed.down)  # [K, H, I]
        projected = jnp.einsum("h,kjih->kji", x_t.astype(jnp.float32), gate_up, precision=highest)
        hidden = activation(projected[:, 0]) * projected[:, 1]  # [K, I]
        outputs = jnp.einsum("ki,khi->kh", hidden, down, precision=highest)
        # Select, never multiply by zero: an inf in an unused expert must not become NaN.
        return jnp.sum(
            jnp.where(valid[:, None], w.astype(jnp.float32)[:, None] * outputs, 0), axis=0
        )

    return jax.lax.map(one_token, (x, expert_ids, expert_weights))
