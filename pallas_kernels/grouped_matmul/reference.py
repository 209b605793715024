"""What the products mean, in plain jnp and float32: the oracle of the kernels."""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.groups import Groups


def expert_of_rows(groups: Groups) -> jax.Array:
    """[R] int32: each row's expert; E for a row in no group."""
    row = jnp.arange(groups.R)[:, None]
    inside = (row >= groups.first_row) & (row < groups.first_row + groups.num_rows)  # [R, E]
    return jnp.where(jnp.any(inside, axis=1), jnp.argmax(inside, axis=1), groups.E)


def reference_grouped_matmul(rows: jax.Array, weights: jax.Array, groups: Groups) -> jax.Array:
    """Each group's rows times its expert's weights, transposed; one expert at a time.

    Args:
      rows: [R, in], any float dtype.
      weights: [E, out, in], any float dtype.
      groups: whose rows are which expert's.

    Returns:
      [R, out] float32; zeros for a row in no group.
    """
    expert = expert_of_rows(groups)[:, None]
    highest = jax.lax.Precision.HIGHEST
    out = jnp.zeros((groups.R, weights.shape[1]), jnp.float32)
    for e in range(groups.E):
        # Selected before the product too, so that a group's inf or NaN stays its own.
        mine = jnp.where(expert == e, rows, 0).astype(jnp.float32)
        product = jnp.matmul(mine, weights[e].astype(jnp.float32).T, precision=highest)
        out = jnp.where(expert == e, product, out)
    return out
