"""Qwen3-MoE as a causal language model, top to bottom; the parts are functions in other files.

Read `Qwen3Moe.__call__` first: embeddings, then the layers of decoder.py, then the final norm, the
head and the losses. A layer is attention and an MLP or MoE block, each on a normed input and added
to the residual.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import losses
from moe_jax.cache import KVCache, LayerCache, overflowed, slots_of
from moe_jax.config import Qwen3MoeConfig
from moe_jax.decode_step import layers
from moe_jax.decoder import LayerParams, StepOptions, TokenPositions
from moe_jax.input_checks import check_inputs
from moe_jax.integers import at_least_int32
from moe_jax.layers import LinearParams, embed, linear, rms_norm
from moe_jax.modules import (
    DecoderLayer,
    Embedding,
    Linear,
    Place,
    RMSNorm,
    params_of,
    placed,
    to_config_format,
)
from moe_jax.packing import places_in_segments, segments_of
from moe_jax.parallel_layers import embed_on_mesh, head_of
from moe_jax.parallelism import Parallelism
from moe_jax.platform_ops import platform_ops
from moe_jax.platforms import resolve_platform
from moe_jax.rope import rope_tables
from moe_jax.routing import Routing
from moe_jax.traces import RoutingTrace


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLMOutput:
    """What a call returns; None for what was not asked for.

    Attributes:
      logits: [B, S', V] in the model's dtype, S' as logits_to_keep says.
      loss: float32 scalar, if labels were given: cross entropy, plus the router losses times their
        coefficients if output_router_logits.
      aux_loss: float32 scalar, the load-balancing loss of all layers pooled, without its
        coefficient.
      aux_loss_per_layer: [MoE layers] float32, the same of each layer by itself.
      z_loss: float32 scalar, the router z-loss, without its coefficient.
      router_logits: for each MoE layer [B*S, E] float32.
      routings: for each MoE layer the Routing of the B*S tokens.
      hidden_states: the embeddings, each layer's output, the last one after the final norm; each
        [B, S, H].
      cache: the KVCache after this call.
    """

    logits: jax.Array
    loss: jax.Array | None = None
    aux_loss: jax.Array | None = None
    aux_loss_per_layer: jax.Array | None = None
    z_loss: jax.Array | None = None
    router_logits: tuple[jax.Array, ...] | None = None
    routings: tuple[Routing, ...] | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    cache: KVCache | None = None


class ModelParams(NamedTuple):
    """The model's parameters: embed_tokens [V, H], the layers, norm [H], lm_head [V, H] or None."""

    embed_tokens: jax.Array
    layers: tuple[LayerParams, ...]
    norm: jax.Array
    lm_head: LinearParams | None


class Qwen3Moe(nnx.Module):
    """The model. Parameters have the names of moe_jax.parameters."""

    Params = ModelParams

    def __init__(
        self,
        config: Qwen3MoeConfig,
        *,
        rngs: nnx.Rngs | None,
        dtype=jnp.bfloat16,
        place: Place | None = None,
    ):
        """Makes random parameters in `dtype`, as the config's initializer_range says.

        Those that its quantization_config says are FP8 are quantised, a layer at a time. Without
        rngs the parameters are shapes, to be replaced by arrays.

        Args:
          config: the model's.
          rngs: what they are drawn from, or None.
          dtype: of plain parameters.
          place: what moves a layer's parameters once they are drawn, as Parallelism.place does:
            then the default device holds one layer at a time. None leaves them there.

        Raises:
          NotImplementedError: a quantisation other than FP8 in blocks.
        """
        self.config = config
        self.embed_tokens = Embedding(config, rngs=rngs, dtype=dtype)
        self.layers = nnx.List(
            placed(
                to_config_format(
                    DecoderLayer(config, layer, rngs=rngs, dtype=dtype), config, f"layers.{layer}"
                ),
                f"layers.{layer}",
                place,
            )
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, rngs=rngs, dtype=dtype)
        tied = config.tie_word_embeddings
        H, V = config.hidden_size, config.vocab_size
        self.lm_head = None if tied else Linear(config, H, V, rngs=rngs, dtype=dtype)
        placed(self, "", place)  # those that are left

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        empty_cache: bool = False,
        labels: jax.Array | None = None,
        logits_to_keep: int | jax.Array = 0,
        output_router_logits: bool | None = None,
        output_routings: bool = False,
        output_hidden_states: bool = False,
        experts_backend: str = "auto",
        attention_backend: str = "auto",
        layers_backend: str = "auto",
        platform: str | None = None,
        phase: str | None = None,
        remat: bool = False,
        parallelism: Parallelism | None = None,
        replay: RoutingTrace | None = None,
    ) -> CausalLMOutput:
        """Runs the model on new tokens.

        Args:
          input_ids: [B, S] integers in [0, V); inside a compiled function one outside makes its
            row's logits NaN.
          inputs_embeds: [B, S, H] instead of input_ids.
          attention_mask: [B, S], 0 for padding, anywhere in a row; None: all valid. It is the mask
            of the new tokens only, with a cache too.
          position_ids: [1 or B, S] integers for RoPE. By default a token's place among the valid
            tokens of its sequence, those in the cache included: padding on either side needs no
            position_ids. Without attention_mask, cache and segment_ids, a position that is not the
            one before plus 1 begins another sequence, as in transformers.
          segment_ids: [B, S] integers, equal for the tokens of one sequence, where a row holds
            several: a token attends to its own sequence only. Not with a cache.
          cache: what init_cache or the call before returned; it is not changed. A row with more
            tokens than its cache can hold gets logits of NaN.
          empty_cache: whether the cache is known to hold no token, as init_cache makes it: the new
            tokens then attend to themselves, and not to all of the cache's slots.
          labels: [B, S] integers, -100 where nothing is to be predicted. What only padding or
            another sequence would predict is left out, whatever its label is.
          logits_to_keep: how many of the last positions (0: all), or indices [N] or [B, N].
          output_router_logits: None takes the config's.
          output_routings: whether to return each MoE layer's Routing.
          output_hidden_states: whether to return every layer's output.
          experts_backend: as in moe_jax.experts.experts.
          attention_backend: as in moe_jax.attention.attention.
          layers_backend: a name in moe_jax.decode_step.LAYERS_BACKENDS, or "auto": the environment
            variable MOE_JAX_LAYERS_BACKEND, and without that the table of moe_jax.dispatch. A
            backend named for experts or attention is one of the blocks'.
          platform: what to write the computation for, as in moe_jax.platforms.resolve_platform.
          phase: a name in moe_jax.dispatch.PHASES, for the table. None: "training" with labels,
            "decode" with a cache and S = 1, else "prefill".
          remat: whether a gradient computes each layer anew, so that of a layer only its input is
            kept.
          parallelism: the mesh to run on, in a compiled function. The parameters should lie as its
            rule says, because others are moved at each call. None: one device, or as the compiler
            places a computation with split arrays.
          replay: a trace with [MoE layers, B*S, K] experts, in place of the routers' choice.

        Raises:
          ValueError: both or none of input_ids and inputs_embeds, a shape or dtype that does not
            fit, ids out of range, labels with logits_to_keep, segment_ids with a cache; a mesh that
            does not divide the config or the rows, or Explicit axes in jax.set_mesh.
          TypeError: a list in place of an array.
        """
        config = self.config
        if parallelism is not None:
            parallelism.check(config)
        B, S = check_inputs(
            config,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
            cache=cache,
            labels=labels,
            logits_to_keep=logits_to_keep,
            replay=replay,
        )
        params = params_of(self)
        phase = _phase(labels, cache, S) if phase is None else phase
        with jax.named_scope("embed"):
            if inputs_embeds is not None:
                x = inputs_embeds
            elif parallelism is None:
                x = embed(input_ids, params.embed_tokens)
            else:
                x = embed_on_mesh(input_ids, params.embed_tokens, parallelism, phase)

        # 1. Where each token stands in its row, and the angles that this gives.
        options = StepOptions(
            config=config,
            platform=resolve_platform(platform),
            phase=phase,
            experts_backend=experts_backend,
            attention_backend=attention_backend,
            layers_backend=layers_backend,
            remat=remat,
            unpadded=attention_mask is None,
            empty_cache=empty_cache,
            parallelism=parallelism,
        )
        valid = jnp.ones((B, S), bool) if attention_mask is None else attention_mask > 0
        lengths = jnp.zeros(B, jnp.int32) if cache is None else cache.lengths
        ops = platform_ops(options.platform)
        slots = slots_of(valid, lengths, ops)  # [B, S]
        segments = segment_ids
        if position_ids is None and segments is None:
            position_ids = jnp.maximum(slots, 0)
        elif position_ids is None:
            position_ids = places_in_segments(segments, valid)
        elif segments is None and attention_mask is None and cache is None:
            segments = segments_of(jnp.broadcast_to(position_ids, (B, S)), ops)
        rope = rope_tables(
            config.rope, config.head_dim, config.max_position_embeddings, position_ids, jnp.float32
        )

        # 2. The layers.
        positions = TokenPositions(rope, slots, valid, lengths, segments)
        caches = None
        if cache is not None:
            caches = tuple(map(LayerCache, cache.keys, cache.values))
        outputs, caches, routings = layers(params.layers, x, positions, caches, replay, options)
        normed = rms_norm(outputs[-1], params.norm, config.rms_norm_eps)
        hidden_states = [x, *outputs[:-1], normed]
        if cache is not None:
            keys, values = zip(*caches, strict=True)
            lengths = lengths + jnp.sum(valid, axis=1, dtype=jnp.int32)
            cache = KVCache(keys=keys, values=values, lengths=lengths)

        # 3. The head.
        with jax.named_scope("lm_head"):
            head = params.embed_tokens if params.lm_head is None else params.lm_head.weight
            logits = linear(_keep(normed, logits_to_keep), head_of(head, parallelism))
        if cache is not None:
            logits = jnp.where(overflowed(cache, config)[:, None, None], jnp.nan, logits)

        # 4. The losses.
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        loss = None
        if labels is not None:
            padded = None if attention_mask is None else valid
            loss = losses.cross_entropy(logits, labels, valid=padded, segments=segments)
        router = _router_losses(config, routings, valid) if output_router_logits else {}
        if loss is not None and router:
            loss = loss + config.router_aux_loss_coef * router["aux_loss"]
            loss = loss + config.router_z_loss_coef * router["z_loss"]
        return CausalLMOutput(
            logits=logits,
            loss=loss,
            **router,
            routings=tuple(routings) if output_routings else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            cache=cache,
        )


def _phase(labels, cache: KVCache | None, S: int) -> str:
    if labels is not None:
        return "training"
    return "decode" if cache is not None and S == 1 else "prefill"


def _keep(x: jax.Array, logits_to_keep: int | jax.Array) -> jax.Array:
    """[B, S', H]: the positions whose logits are wanted."""
    if jnp.ndim(logits_to_keep) == 0:
        return x[:, -logits_to_keep:] if logits_to_keep else x
    logits_to_keep = at_least_int32(logits_to_keep)
    if logits_to_keep.ndim == 1:
        return x[:, logits_to_keep]
    return jnp.take_along_axis(x, logits_to_keep[:, :, None], axis=1)


def _router_losses(config: Qwen3MoeConfig, routings: list[Routing], valid: jax.Array) -> dict:
    logits = tuple(routing.logits for routing in routings)
    if not logits:
        return {}
    K, valid = config.num_experts_per_tok, valid.reshape(-1)
    return {
        "router_logits": logits,
        "aux_loss": losses.load_balancing_loss(logits, K, valid),
        "aux_loss_per_layer": losses.load_balancing_loss_per_layer(logits, K, valid),
        "z_loss": losses.router_z_loss(logits, valid),
    }
