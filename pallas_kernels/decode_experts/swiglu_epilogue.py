"""From a gate/up product on the tensor cores to hidden, in registers.

A product has the gate rows of some neurons above their up rows, for block_n tokens:

    M = 64     [64, N]     rows 0..31   gate_e x     in two of the four warps
                           rows 32..63  up_e x       in the other two
    M = 128    [128, N]    rows 0..63   gate_e x     of one wgmma
                           rows 64..127 up_e x       of another: in the same lanes

With M = 64 a neuron's two values are in different warps, so they go through shared memory. With
M = 128 their product does, because tokens are to be rows all the same. Then a lane has a neuron's
value, and the routing weight of its token.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK_M = 64  # rows of weights that one wgmma takes
_HALF = BLOCK_M // 2


def by_token(neurons: int) -> Any:
    """The layout of [N, neurons] in registers: 4 warps by 2 tokens, 16 lanes along the neurons."""
    return plgpu.Layout.TILED(
        plgpu.Tiling(((8, neurons), (2, neurons // 16))),
        warp_dims=(-4,),
        lane_dims=(-2, -3),
        vector_dim=-1,
    )


def exchange_type(N: int):
    """The shared memory through which a neuron's two values meet."""
    return plgpu.SMEM((N, BLOCK_M), jnp.float32)


def load_weights(weight_gmem, layout) -> jax.Array:
    """[N] float32: the routing weights of a tile's tokens."""
    return plgpu.load(weight_gmem, layout=layout, optimized=False)


def spread_weights(weights: list[jax.Array], N: int, layout) -> jax.Array:
    """[N] as load_weights gives them, from up to N scalars; zeros behind them."""
    columns = plgpu.broadcasted_iota(jnp.int32, (N,), 0, layout=layout)
    spread = plgpu.layout_cast(jnp.zeros((N,), jnp.float32), layout)
    for column, weight in enumerate(weights):
        spread = jnp.where(columns == column, weight, spread)
    return spread


def product_rows(neurons: int) -> int:
    """M of the product of some neurons: 64 up to 32 of them, else 128."""
    return BLOCK_M if neurons <= _HALF else 2 * BLOCK_M


def swiglu_epilogue(
    product: jax.Array, weights: jax.Array, exchange, neurons: int
) -> tuple[jax.Array, jax.Array]:
    """Weight * silu(gate) * up in split bf16: the high and the low half, each [N, neurons].

    The two bf16 numbers have 16 bits of mantissa between them.

    Args:
      product: [M, N] float32, M as product_rows has it.
      weights: [N] in the layout by_token(neurons).reduce(1), see load_weights and spread_weights.
      exchange: see exchange_type.
      neurons: of the product.
    """

    def load(first):
        part = exchange.at[:, pl.ds(first, neurons)]
        return plgpu.load(part, layout=by_token(neurons), optimized=False)

    if product.shape[0] == BLOCK_M:
        store_transposed(exchange, product)
        value = _swiglu(load(0), load(_HALF))
    else:
        store_transposed(exchange, _swiglu(product[:BLOCK_M], product[BLOCK_M:]))
        value = load(0)
    value *= lax.broadcast_in_dim(weights, value.shape, (0,))
    high = value.astype(jnp.bfloat16)
    return high, (value - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return gate / (1 + jnp.exp(-gate)) * up


def store_transposed(smem, product: jax.Array) -> None:
    """Stores [M, N] as [N, M], once no copy reads what is there any more."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    product = plgpu.layout_cast(product, plgpu.Layout.WGMMA_TRANSPOSED)
    smem.transpose((1, 0))[...] = product
    plgpu.commit_smem()
