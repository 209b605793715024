"""From a gate/up product on the tensor cores to hidden, in registers.

One product of M = 64 has the gate rows of 32 neurons above their up rows, for block_n tokens:

    product [64, N]    rows 0..31   gate_e x     in two of the four warps
                       rows 32..63  up_e x       in the other two

A neuron's two values are in different warps, so they go through shared memory, transposed. Then a
lane has both, and the routing weight of their token.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK_M = 64  # rows of weights that one wgmma takes
NEURONS = BLOCK_M // 2
# [N, NEURONS] in registers: 4 warps by 2 tokens, 16 lanes along a token's neurons.
_BY_TOKEN = plgpu.Layout.TILED(
    plgpu.Tiling(((8, NEURONS), (2, 2))), warp_dims=(-4,), lane_dims=(-2, -3), vector_dim=-1
)
TOKENS = _BY_TOKEN.reduce(1)  # [N], as swiglu_epilogue takes the routing weights


def exchange_type(N: int):
    """The shared memory through which a neuron's two values meet."""
    return plgpu.SMEM((N, BLOCK_M), jnp.float32)


def load_weights(weight_gmem, layout=TOKENS) -> jax.Array:
    """[N] float32: the routing weights of a tile's tokens."""
    return plgpu.load(weight_gmem, layout=layout, optimized=False)


def spread_weights(weights: list[jax.Array], N: int, layout=TOKENS) -> jax.Array:
    """[N] as load_weights gives them, from up to N scalars; zeros behind them."""
    columns = plgpu.broadcasted_iota(jnp.int32, (N,), 0, layout=layout)
    spread = plgpu.layout_cast(jnp.zeros((N,), jnp.float32), layout)
    for column, weight in enumerate(weights):
        spread = jnp.where(columns == column, weight, spread)
    return spread


def swiglu_epilogue(
    product: jax.Array, weights: jax.Array, exchange
) -> tuple[jax.Array, jax.Array]:
    """Weight * silu(gate) * up in split bf16: the high and the low half, each [N, NEURONS].

    The two bf16 numbers have 16 bits of mantissa between them.

    Args:
      product: [BLOCK_M, N] float32.
      weights: [N], see load_weights and spread_weights.
      exchange: see exchange_type.
    """
    store_transposed(exchange, product)
    gate, up = (
        plgpu.load(
            exchange.at[:, pl.ds(half * NEURONS, NEURONS)], layout=_BY_TOKEN, optimized=False
        )
        for half in range(2)
    )  # [N, NEURONS]
    weights = lax.broadcast_in_dim(weights, gate.shape, (0,))
    value = gate / (1 + jnp.exp(-gate)) * up * weights
    high = value.astype(jnp.bfloat16)
    return high, (value - high.astype(jnp.float32)).astype(jnp.bfloat16)


def store_transposed(smem, product: jax.Array) -> None:
    """Stores [BLOCK_M, N] as [N, BLOCK_M], once no copy reads what is there any more."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    product = plgpu.layout_cast(product, plgpu.Layout.WGMMA_TRANSPOSED)
    smem.transpose((1, 0))[...] = product
    plgpu.commit_smem()
