"""The MoE block: router, then experts, with what may stand around them."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import Qwen3MoeConfig
from moe_jax.experts import ExpertWeights, SharedExperts, experts
from moe_jax.layers import MLP, Linear, normal_param
from moe_jax.platform_ops import platform_ops
from moe_jax.platforms import resolve_platform
from moe_jax.routing import Routing, replay_route, route, router_logits
from moe_jax.superkernel import configured_scope
from moe_jax.traces import RoutingTrace


class Experts(nnx.Module):
    """The one stored copy: gate_up [E, 2, I, L] (gate first), down [E, L, I]; L is H by default."""

    def __init__(self, config: Qwen3MoeConfig, *, rngs: nnx.Rngs, dtype):
        E, I = config.num_experts, config.moe_intermediate_size
        L = config.moe_latent_size or config.hidden_size
        self.gate_up = normal_param(config, rngs, (E, 2, I, L), dtype)
        self.down = normal_param(config, rngs, (E, L, I), dtype)

    @property
    def weights(self) -> ExpertWeights:
        return ExpertWeights(gate_up=self.gate_up[...], down=self.down[...])


class SparseMoe(nnx.Module):
    """Sends each token to K of E experts and adds what they return, weighted.

    The router and the shared experts read the whole hidden state; with a latent size the experts
    work in L: fc1_latent_proj leads there and fc2_latent_proj back.
    """

    def __init__(self, config: Qwen3MoeConfig, *, rngs: nnx.Rngs, dtype):
        options = {"rngs": rngs, "dtype": dtype}
        H, L, N = (
            config.hidden_size,
            config.moe_latent_size,
            config.moe_shared_expert_intermediate_size,
        )
        # named as in Hugging Face's files: this gate is the router
        self.gate = Linear(config, H, config.num_experts, **options)
        self.experts = Experts(config, **options)
        self.fc1_latent_proj = None if L is None else Linear(config, H, L, **options)
        self.fc2_latent_proj = None if L is None else Linear(config, L, H, **options)
        self.shared_experts = None if N is None else MLP(config, N, **options)
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        *,
        backend: str = "auto",
        platform: str | None = None,
        phase: str = "prefill",
        replay: RoutingTrace | None = None,
    ) -> tuple[jax.Array, Routing]:
        """Runs the block.

        Args:
          x: [B, S, H].
          valid: [B, S] bool; padding is routed nowhere and returns zeros.
          backend, platform, phase: as in moe_jax.experts.experts.
          replay: this layer's experts for these B * S tokens, in place of the router's choice.

        Returns:
          [B, S, H] and the Routing of the B * S tokens.
        """
        config = self.config
        platform = resolve_platform(platform)
        tokens = x.reshape(-1, x.shape[-1])  # [T, H]
        options = {
            "norm_topk_prob": config.norm_topk_prob,
            "valid": valid.reshape(-1),
            "weights_dtype": x.dtype if config.router_dtype == "model" else jnp.float32,
        }
        with jax.named_scope("router"):
            logits = router_logits(tokens, self.gate.weight[...], dtype=config.router_dtype)
            if replay is None:
                ops = platform_ops(platform)
                routing = route(logits, config.num_experts_per_tok, ops=ops, **options)
            else:
                routing = replay_route(logits, replay.expert_ids, replay.expert_weights, **options)

        def run(tokens, weights, ids, expert_weights, fc1, fc2, shared):
            return experts(
                tokens,
                weights,
                ids,
                expert_weights,
                fc1_latent_proj=fc1,
                fc2_latent_proj=fc2,
                shared_experts=shared,
                activation=config.hidden_act,
                backend=backend,
                platform=platform,
                phase=phase,
                chunk=config.moe_chunk_max_len,
            )

        scope = configured_scope(config, "moe", phase=phase, platform=platform)
        with jax.named_scope("experts"):
            y = scope(run)(
                tokens, self.experts.weights, routing.ids, routing.weights, *self._extras()
            )
        return y.reshape(x.shape), routing

    def _extras(self) -> tuple[jax.Array | None, jax.Array | None, SharedExperts | None]:
        """fc1_latent_proj, fc2_latent_proj and the shared experts, None where there is none."""
        fc1, fc2, shared = self.fc1_latent_proj, self.fc2_latent_proj, self.shared_experts
        return (
            None if fc1 is None else fc1.weight[...],
            None if fc2 is None else fc2.weight[...],
            None
            if shared is None
            else SharedExperts(
                gate_proj=shared.gate_proj.weight[...],
                up_proj=shared.up_proj.weight[...],
                down_proj=shared.down_proj.weight[...],
            ),
        )
