"""One layer's experts on a mesh: how tokens meet the experts of other shards.

A shard has E / n experts, and every shard is asked for all of a token's K. An id less the number of
the shard's first expert is inside [0, E / n) for its own experts alone, so others' are padding.

    decode, prefill   all shards of an expert axis have the same tokens: each computes its experts'
                      part, and one sum over expert and tensor has the whole
    training          each has its own tokens, and sends a token once to each shard that has some of
                      its experts; the parts come back and are added up

In training no token is dropped: a block of the buffer has room for all T tokens of a shard.

    shard 0's tokens a, b, c to 2 shards:     a needs both, b shard 1, c shard 0
    rows         [a c -] [a b -]              block s goes to shard s, "-" is padding
    "padded"     all_to_all of whole blocks
    "ragged"     ragged_all_to_all of 2 rows of each block into the same places
    "gather"     all tokens to all shards, without blocks
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.parallel_layers import summed
from moe_jax.parallelism import Parallelism
from pallas_kernels.decode_experts import ExpertWeights

# (x [T, H], ids [T, K], expert_weights [T, K]) -> [T, H], of the experts of one shard.
Compute = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def experts_on_mesh(
    experts: Callable[..., jax.Array],
    x: jax.Array,
    weights: ExpertWeights,
    ids: jax.Array,
    expert_weights: jax.Array,
    activation: str,
    *,
    E: int,
    parallelism: Parallelism,
    phase: str,
    platform: str,
) -> jax.Array:
    """[T, H]: the parts of all shards, added up; inside the function of each device.

    Args:
      experts: as moe_jax.experts.experts, of one shard's weights and of ids in [0, E / n).
      x: [T, H], this device's tokens.
      weights: this device's shard.
      ids: [T, K] int32 in [0, E), or padding.
      expert_weights: [T, K].
      activation: as in `experts`.
      E: experts of all shards.
      parallelism: the mesh.
      phase, platform: as in `experts`.
    """

    def compute(x, ids, expert_weights) -> jax.Array:
        return experts(x, weights, ids, expert_weights, activation=activation)

    n = parallelism.size("expert")
    local = E // n
    ids = jnp.where((ids >= 0) & (ids < E), ids, -1)
    if phase != "training" or n == 1:
        first = lax.axis_index("expert") * local
        y = compute(x, ids - first, expert_weights)  # padding is -1, below any first
        return summed(y, parallelism, "expert", "tensor")
    exchange = parallelism.exchange
    if exchange == "auto":
        exchange = "ragged" if platform == "cuda" else "padded"
    if exchange == "gather":
        y = _by_gather(compute, x, ids, expert_weights, local)
    else:
        y = _by_blocks(compute, x, ids, expert_weights, local, n, exchange == "ragged")
    return summed(y, parallelism, "tensor")


def _by_gather(compute: Compute, x, ids, expert_weights, local: int) -> jax.Array:
    first = lax.axis_index("expert") * local
    every = [lax.all_gather(a, "expert", tiled=True) for a in (x, ids, expert_weights)]
    y = compute(every[0], every[1] - first, every[2])
    return lax.psum_scatter(y, "expert", tiled=True)


def _by_blocks(
    compute: Compute, x, ids, expert_weights, local: int, n: int, ragged: bool
) -> jax.Array:
    T, K = ids.shape
    owner = jnp.where(ids >= 0, ids // local, n)  # [T, K]
    shards = jnp.arange(n, dtype=ids.dtype)
    needed = jnp.any(owner[:, :, None] == shards, axis=1)  # [T, n]
    counts = jnp.sum(needed, axis=0, dtype=jnp.int32)  # [n]
    place = jnp.cumsum(needed, axis=0, dtype=jnp.int32) - 1  # [T, n], in the shard's block
    token = jnp.argsort(~needed, axis=0, stable=True).T  # [n, T], the inverse of it

    filled = jnp.arange(T) < counts[:, None]  # [n, T]
    own = filled[..., None] & (owner[token] == shards[:, None, None])  # [n, T, K]
    rows = jnp.where(filled[..., None], x[token], 0)  # [n, T, H]
    row_ids = jnp.where(own, ids[token] - shards[:, None, None] * local, -1)
    row_weights = jnp.where(own, expert_weights[token], 0)

    back_counts = _swapped(counts)
    rows = _sent(rows, counts, back_counts, ragged)
    row_ids, row_weights = _swapped(row_ids), _swapped(row_weights)
    y = compute(rows.reshape(n * T, -1), row_ids.reshape(-1, K), row_weights.reshape(-1, K))
    y = _sent(y.reshape(n, T, -1), back_counts, counts, ragged)

    parts = jnp.take_along_axis(y, jnp.maximum(place, 0).T[..., None], axis=1)  # [n, T, H]
    parts = jnp.where(needed.T[..., None], parts, 0).astype(jnp.float32)
    return jnp.sum(parts, axis=0).astype(x.dtype)


def _swapped(blocks: jax.Array) -> jax.Array:
    """[n, ...]: block s goes to shard s, and block p of the result is shard p's."""
    return lax.all_to_all(blocks, "expert", split_axis=0, concat_axis=0, tiled=True)


def _sent(blocks: jax.Array, counts: jax.Array, arriving: jax.Array, ragged: bool) -> jax.Array:
    """`_swapped` of blocks [n, T, H] of which counts [n] rows matter; the others become zeros."""
    if not ragged:
        return _swapped(blocks)
    n, T, H = blocks.shape
    rows = blocks.reshape(n * T, H)
    first = lax.axis_index("expert") * T
    sent = lax.ragged_all_to_all(
        rows,
        jnp.zeros_like(rows),
        input_offsets=jnp.arange(n, dtype=jnp.int32) * T,
        send_sizes=counts,
        output_offsets=jnp.full(n, first, jnp.int32),
        recv_sizes=arriving,
        axis_name="expert",
    )
    return sent.reshape(n, T, H)
