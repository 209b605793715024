"""The MoE block: router, then experts."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import Qwen3MoeConfig
from moe_jax.experts import ExpertWeights, experts
from moe_jax.layers import Linear, normal_param
from moe_jax.routing import Routing, replay_route, route, router_logits
from moe_jax.traces import RoutingTrace


class Experts(nnx.Module):
    """The one stored copy: gate_up [E, 2, I, H] (gate first), down [E, H, I]."""

    def __init__(self, config: Qwen3MoeConfig, *, rngs: nnx.Rngs, dtype):
        E, I, H = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up = normal_param(config, rngs, (E, 2, I, H), dtype)
        self.down = normal_param(config, rngs, (E, H, I), dtype)

    @property
    def weights(self) -> ExpertWeights:
        return ExpertWeights(gate_up=self.gate_up[...], down=self.down[...])


class SparseMoe(nnx.Module):
    """Sends each token to K of E experts and adds what they return, weighted."""

    def __init__(self, config: Qwen3MoeConfig, *, rngs: nnx.Rngs, dtype):
        # named as in Hugging Face's files: this gate is the router
        self.gate = Linear(config, config.hidden_size, config.num_experts, rngs=rngs, dtype=dtype)
        self.experts = Experts(config, rngs=rngs, dtype=dtype)
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        *,
        backend: str = "auto",
        decode: bool = False,
        replay: RoutingTrace | None = None,
    ) -> tuple[jax.Array, Routing]:
        """Runs the block.

        Args:
          x: [B, S, H].
          valid: [B, S] bool; padding is routed nowhere and returns zeros.
          backend, decode: as in moe_jax.experts.experts.
          replay: this layer's experts for these B * S tokens, in place of the router's choice.

        Returns:
          [B, S, H] and the Routing of the B * S tokens.
        """
        config = self.config
        tokens = x.reshape(-1, x.shape[-1])  # [T, H]
        options = {
            "norm_topk_prob": config.norm_topk_prob,
            "valid": valid.reshape(-1),
            "weights_dtype": x.dtype if config.router_dtype == "model" else jnp.float32,
        }
        with jax.named_scope("router"):
            logits = router_logits(tokens, self.gate.weight[...], dtype=config.router_dtype)
            if replay is None:
                routing = route(logits, config.num_experts_per_tok, **options)
            else:
                routing = replay_route(logits, replay.expert_ids, replay.expert_weights, **options)
        with jax.named_scope("experts"):
            y = experts(
                tokens,
                self.experts.weights,
                routing.ids,
                routing.weights,
                activation=config.hidden_act,
                backend=backend,
                decode=decode,
                chunk=config.moe_chunk_max_len,
            )
        return y.reshape(x.shape), routing
