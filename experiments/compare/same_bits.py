"""Does a candidate give the same bits again, and does a token's result depend on its neighbours?"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.compare.routings import Routing
from pallas_kernels.decode_experts import ExpertWeights

REPEATS = 20
# Tokens that are also computed alone.
_ALONE = 4


def repeated(layer: Callable, weights: ExpertWeights, x: jax.Array, routing: Routing) -> bool:
    """Whether REPEATS runs on one input agree in every bit.

    Args:
      layer: (x [T, H], weights, expert_ids [T, K], expert_weights [T, K]) -> [T, H].
      weights: of one layer.
      x: [T, H].
      routing: of the T tokens.
    """
    arguments = x, weights, jnp.asarray(routing.expert_ids), jnp.asarray(routing.expert_weights)
    first = np.asarray(layer(*arguments))
    return all(np.array_equal(np.asarray(layer(*arguments)), first) for _ in range(REPEATS - 1))


def alone(layer: Callable, weights: ExpertWeights, x: jax.Array, routing: Routing) -> bool:
    """Whether tokens have the same bits in the batch, in the batch turned round, and alone (T = 1).

    Arguments as in `repeated`. The first and the last few tokens are run alone.
    """
    ids, w = jnp.asarray(routing.expert_ids), jnp.asarray(routing.expert_weights)
    together = np.asarray(layer(x, weights, ids, w))
    turned = np.asarray(layer(x[::-1], weights, ids[::-1], w[::-1]))[::-1]
    if not np.array_equal(turned, together):
        return False
    T = x.shape[0]
    some = sorted({*range(min(T, _ALONE // 2)), *range(max(0, T - _ALONE // 2), T)})
    return all(
        np.array_equal(
            np.asarray(layer(x[t : t + 1], weights, ids[t : t + 1], w[t : t + 1])),
            together[t : t + 1],
        )
        for t in some
    )
