"""Named errors for what decode_experts cannot take: the field, its value and what is accepted."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_experts.arrays import expect_array
from pallas_kernels.decode_experts.weights import ExpertShapes, ExpertWeights

SIZE_MULTIPLE = 64


def check_inputs(
    x: jax.Array,
    weights: ExpertWeights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    out_dtype,
) -> tuple[ExpertShapes, int]:
    """Returns the layer's sizes and T, or raises ValueError, TypeError or NotImplementedError."""
    if not isinstance(weights, ExpertWeights):
        raise TypeError(f"weights is a {type(weights).__name__}; expected an ExpertWeights")
    if weights.gate_up_scale is not None or weights.down_scale is not None:
        raise NotImplementedError(
            "weights.gate_up_scale and weights.down_scale must be None: no layout reads quantised "
            "weights; dequantise to bfloat16 first"
        )
    expect_array("x", x, "[T, H]", jnp.bfloat16)
    expect_array("weights.gate_up", weights.gate_up, "[E, 2, I, H]", jnp.bfloat16)
    expect_array("weights.down", weights.down, "[E, H, I]", jnp.bfloat16)
    expect_array("expert_ids", expert_ids, "[T, K]", jnp.int32)
    expect_array("expert_weights", expert_weights, "[T, K]", jnp.float32)
    if out_dtype not in (None, jnp.bfloat16, jnp.float32):
        raise TypeError(f"out_dtype is {out_dtype!r}; expected bfloat16 or float32")

    T, H = x.shape
    K = expert_ids.shape[1]
    E, _, I, _ = weights.gate_up.shape
    expected = {
        "weights.gate_up": (weights.gate_up, "[E, 2, I, H]", (E, 2, I, H)),
        "weights.down": (weights.down, "[E, H, I]", (E, H, I)),
        "expert_ids": (expert_ids, "[T, K]", (T, K)),
        "expert_weights": (expert_weights, "[T, K]", (T, K)),
    }
    for name, (value, letters, shape) in expected.items():
        if value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}; expected {letters} = {shape}")
    if K > E:
        raise ValueError(f"expert_ids has K = {K} experts a token; expected at most E = {E}")
    for letter, size in (("H", H), ("I", I)):
        if size % SIZE_MULTIPLE:
            raise ValueError(f"{letter} is {size}; expected a multiple of {SIZE_MULTIPLE}")
    return ExpertShapes(E=E, K=K, H=H, I=I), T
