"""The decoder layers: one of them, and all in a row, with the superkernel scopes around them."""

import dataclasses
from typing import NamedTuple

import jax
from flax import nnx

from moe_jax.attention import Attention
from moe_jax.config import Qwen3MoeConfig
from moe_jax.layers import MLP, RMSNorm
from moe_jax.moe import SparseMoe
from moe_jax.platform_ops import platform_ops
from moe_jax.routing import Routing
from moe_jax.superkernel import configured_scope
from moe_jax.traces import RoutingTrace


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """How the layers are computed: nothing here is an array.

    Attributes:
      platform: as resolve_platform returns it.
      phase: "prefill", "decode" or "training".
      backend: the experts'.
    """

    platform: str
    phase: str
    backend: str


class Where(NamedTuple):
    """Where the new tokens stand.

    Attributes:
      rope: (cos, sin), each [1 or B, S, D].
      slots: [B, S] int32, each token's place in its row.
      valid: [B, S] bool, False for padding.
      lengths: [B] int32, tokens in each row before these.
    """

    rope: tuple[jax.Array, jax.Array]
    slots: jax.Array
    valid: jax.Array
    lengths: jax.Array


Stored = tuple[jax.Array, jax.Array]  # one layer's keys and values, [B, kv, C, D] each


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the MLP has experts or is dense."""

    def __init__(self, config: Qwen3MoeConfig, layer: int, *, rngs: nnx.Rngs, dtype):
        H, options = config.hidden_size, {"rngs": rngs, "dtype": dtype}
        self.input_layernorm = RMSNorm(config, H, dtype=dtype)
        self.self_attn = Attention(config, **options)
        self.post_attention_layernorm = RMSNorm(config, H, dtype=dtype)
        self.is_moe = config.is_moe_layer(layer)
        self.mlp = (
            SparseMoe(config, **options)
            if self.is_moe
            else MLP(config, config.intermediate_size, **options)
        )
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        where: Where,
        stored: Stored | None,
        replay: RoutingTrace | None,
        how: How,
    ) -> tuple[jax.Array, Stored | None, Routing | None]:
        """Returns x [B, S, H], the layer's (keys, values) or None, and its Routing or None."""
        with jax.named_scope("attention"):
            attended, updated = self._attend(self.input_layernorm(x), where, stored, how)
        x = x + attended
        normed = self.post_attention_layernorm(x)
        if not self.is_moe:
            with jax.named_scope("mlp"):
                return x + self.mlp(normed), updated, None
        with jax.named_scope("moe"):
            y, routing = self.mlp(
                normed,
                where.valid,
                backend=how.backend,
                platform=how.platform,
                phase=how.phase,
                replay=replay,
            )
        return x + y, updated, routing

    def _attend(self, normed: jax.Array, where: Where, stored: Stored | None, how: How):
        graph, parameters = nnx.split(self.self_attn)

        def attend(parameters, normed, where, stored):
            before = None if stored is None else (*stored, where.lengths)
            return nnx.merge(graph, parameters)(
                normed, where.rope, where.slots, where.valid, before, platform_ops(how.platform)
            )

        scope = configured_scope(self.config, "attention", phase=how.phase, platform=how.platform)
        return scope(attend)(parameters, normed, where, stored)


def run_layers(
    layers: nnx.List,
    config: Qwen3MoeConfig,
    x: jax.Array,
    where: Where,
    stored: tuple[Stored, ...] | None,
    replay: RoutingTrace | None,
    how: How,
) -> tuple[list[jax.Array], tuple[Stored, ...] | None, list[Routing]]:
    """Runs all layers, one after the other.

    Args:
      layers: of DecoderLayer.
      config: the model's.
      x: [B, S, H], the embeddings.
      where: where the tokens stand.
      stored: each layer's (keys, values), or None without a cache.
      replay: a trace with [MoE layers, B*S, K] experts, or None.
      how: how to compute them.

    Returns:
      Each layer's output [B, S, H], its (keys, values) after these tokens, and the Routing of each
      MoE layer.
    """
    graph, parameters = nnx.split(layers)

    def run(parameters, x, where, stored, replay):
        outputs, after, routings = [], [], []
        for index, layer in enumerate(nnx.merge(graph, parameters)):
            with jax.named_scope(f"layer_{index}"):
                x, updated, routing = layer(
                    x,
                    where,
                    None if stored is None else stored[index],
                    replay.layer(len(routings)) if replay is not None and layer.is_moe else None,
                    how,
                )
            outputs.append(x)
            after.append(updated)
            if routing is not None:
                routings.append(routing)
        return outputs, None if stored is None else tuple(after), routings

    scope = configured_scope(config, "model", phase=how.phase, platform=how.platform)
    return scope(run)(parameters, x, where, stored, replay)
