"""How evenly tokens spread over experts, and how many experts a batch touches."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.routing import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingStatistics:
    """Of one layer and one batch; padding counts nowhere.

    Attributes:
      load: [E] int32, the assignments of each expert; they add up to K times the valid tokens.
      imbalance: float32, the largest load over the mean load: 1 if all are equal, E / K at worst.
      load_entropy: float32, of the shares of the load, in nats: log E if all are equal.
      router_entropy: float32, the mean over tokens of the entropy of their probabilities, in nats.
      unique_experts: int32, experts with at least one assignment: what a decode step must read.
      dead_experts: int32, experts without any.
    """

    load: jax.Array
    imbalance: jax.Array
    load_entropy: jax.Array
    router_entropy: jax.Array
    unique_experts: jax.Array
    dead_experts: jax.Array


def routing_statistics(routing: Routing) -> RoutingStatistics:
    """Counts what a Routing does. All zero, and no NaN, if every token is padding."""
    E = routing.probabilities.shape[-1]
    load = expert_load(routing.ids, E)
    total = jnp.maximum(jnp.sum(load), 1).astype(jnp.float32)
    valid = jnp.any(routing.ids >= 0, axis=-1)  # [T]
    entropies = entropy_of(routing.probabilities)  # [T]
    unique = jnp.sum(load > 0, dtype=jnp.int32)
    return RoutingStatistics(
        load=load,
        imbalance=imbalance_of(load),
        load_entropy=entropy_of(load / total),
        router_entropy=jnp.sum(jnp.where(valid, entropies, 0)) / jnp.maximum(jnp.sum(valid), 1),
        unique_experts=unique,
        dead_experts=E - unique,
    )


def expert_load(ids: jax.Array, E: int) -> jax.Array:
    """[E] int32: how often each expert occurs in ids [T, K]; ids outside [0, E) are padding."""
    return jnp.sum(ids[:, :, None] == jnp.arange(E), axis=(0, 1), dtype=jnp.int32)


def imbalance_of(load: jax.Array) -> jax.Array:
    """[...] float32 from load [..., E]: the largest over the mean; 0 if all are 0."""
    total = jnp.maximum(jnp.sum(load, axis=-1), 1).astype(jnp.float32)
    return jnp.max(load, axis=-1) * load.shape[-1] / total


def entropy_of(shares: jax.Array) -> jax.Array:
    """[...] in nats, of shares [..., E] that add up to 1."""
    positive = jnp.where(shares > 0, shares, 1)  # 0 * log 0 is 0
    return -jnp.sum(positive * jnp.log(positive), axis=-1)
