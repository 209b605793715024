"""The decoder as pure functions of parameters and arrays, from all layers down to their two blocks.

Read run_layers, then decoder_layer, attention_block and moe_block. Parameters are NamedTuples of
arrays, named as in Hugging Face's files; the NNX modules of modules.py hold them. The last function
is the only place that opens the blocks' superkernel scopes. decode_step.py chooses between these
blocks and the kernels that compute all layers of a decode step.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.attention import attention
from moe_jax.cache import LayerCache, extend
from moe_jax.config import Qwen3MoeConfig
from moe_jax.experts import ExpertWeights, SharedExperts, experts
from moe_jax.layers import LinearParams, MLPParams, linear, mlp, rms_norm
from moe_jax.parallel_layers import gathered, linear_of_split, rematerialised, summed
from moe_jax.parallelism import Parallelism
from moe_jax.platform_ops import platform_ops
from moe_jax.platforms import has_all_of_xla
from moe_jax.rope import apply_rope
from moe_jax.routing import Routing, replay_route, route, router_logits
from moe_jax.superkernel import configured_scope
from moe_jax.traces import RoutingTrace
from pallas_kernels.block_scaled_fp8 import holds_fp8


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How the layers are computed. Nothing here is an array, so all of it is static under jit.

    Attributes:
      config: the model's.
      platform: as resolve_platform returns it.
      phase: "prefill", "decode" or "training".
      experts_backend, attention_backend: as in moe_jax.experts and moe_jax.attention.
      layers_backend: as in moe_jax.decode_step.
      remat: whether a gradient computes each layer anew, so that of a layer only its input is kept.
      unpadded: whether all tokens are known to be valid.
      empty_cache: whether the cache, if there is one, is known to be empty.
      parallelism: the mesh that the layers run on; None for one device.
    """

    config: Qwen3MoeConfig
    platform: str
    phase: str
    experts_backend: str = "auto"
    attention_backend: str = "auto"
    layers_backend: str = "auto"
    remat: bool = False
    unpadded: bool = False
    empty_cache: bool = False
    parallelism: Parallelism | None = None


class TokenPositions(NamedTuple):
    """Where the new tokens stand.

    Attributes:
      rope: (cos, sin), each [1 or B, S, D]; float32, in the blocks in the model's dtype.
      slots: [B, S] int32, each token's place in its row.
      valid: [B, S] bool, False for padding.
      lengths: [B] int32, tokens in each row before these.
      segments: [B, S] int32, the sequence of its row that each token belongs to; None for one a
        row.
    """

    rope: tuple[jax.Array, jax.Array]
    slots: jax.Array
    valid: jax.Array
    lengths: jax.Array
    segments: jax.Array | None = None


class AttentionParams(NamedTuple):
    """q_proj [heads*D, H], k_proj and v_proj [kv*D, H], o_proj [H, heads*D], two norms [D]."""

    q_proj: LinearParams
    k_proj: LinearParams
    v_proj: LinearParams
    o_proj: LinearParams
    q_norm: jax.Array
    k_norm: jax.Array


class MoeParams(NamedTuple):
    """The router's gate [E, H], the experts, and what may stand around them.

    Attributes:
      gate: [E, H].
      experts: gate_up [E, 2, I, L], down [E, L, I]; L is H without latent projections.
      fc1_latent_proj: [L, H], or None.
      fc2_latent_proj: [H, L], or None.
      shared_experts: an MLP that every token goes through, or None.
    """

    gate: LinearParams | None
    experts: ExpertWeights
    fc1_latent_proj: LinearParams | None = None
    fc2_latent_proj: LinearParams | None = None
    shared_experts: MLPParams | None = None


class LayerParams(NamedTuple):
    """One layer's: two norms [H], attention, and an MLP with experts or a dense one."""

    input_layernorm: jax.Array
    self_attn: AttentionParams
    post_attention_layernorm: jax.Array
    mlp: MoeParams | MLPParams


Caches = tuple[LayerCache, ...]  # one for each layer


def run_layers(
    params: tuple[LayerParams, ...],
    x: jax.Array,
    positions: TokenPositions,
    caches: Caches | None,
    replay: RoutingTrace | None,
    options: StepOptions,
) -> tuple[list[jax.Array], Caches | None, list[Routing]]:
    """Runs all layers, one after the other.

    Args:
      params: each layer's.
      x: [B, S, H], the embeddings.
      positions: where the tokens stand.
      caches: each layer's, or None.
      replay: a trace with [MoE layers, B*S, K] experts, or None.
      options: how to compute them.

    Returns:
      Each layer's output [B, S, H], the caches with these tokens, and each MoE layer's Routing.
    """
    outputs, updated, routings = [], [], []
    run_layer = functools.partial(decoder_layer, options=options)
    run_layer = rematerialised(run_layer, options.remat, options.parallelism)
    for index, layer in enumerate(params):
        if holds_fp8(layer) and has_all_of_xla(options.platform):
            # Tied to x, because XLA would dequantise all layers first: it moves what does not
            # change out of a loop over steps, and on a CPU it begins early what it can begin.
            x, layer = jax.lax.optimization_barrier((x, layer))
        replays = replay is not None and isinstance(layer.mlp, MoeParams)
        with jax.named_scope(f"layer_{index}"):
            x, cache, routing = run_layer(
                layer,
                x,
                positions,
                None if caches is None else caches[index],
                replay.layer(len(routings)) if replays else None,
            )
        outputs.append(x)
        updated.append(cache)
        if routing is not None:
            routings.append(routing)
    return outputs, None if caches is None else tuple(updated), routings


def decoder_layer(
    params: LayerParams,
    x: jax.Array,
    positions: TokenPositions,
    cache: LayerCache | None,
    replay: RoutingTrace | None,
    options: StepOptions,
) -> tuple[jax.Array, LayerCache | None, Routing | None]:
    """Adds attention(norm(x)) to x [B, S, H], then mlp(norm(x)); the MLP has experts or is dense.

    Returns:
      x [B, S, H], the layer's cache with these tokens, and the Routing of an MoE layer.
    """
    config = options.config
    params = gathered(params, options.parallelism)
    with jax.named_scope("attention"):
        normed = rms_norm(x, params.input_layernorm, config.rms_norm_eps)
        attend = scoped(attention_block, options)
        attended, cache = attend(params.self_attn, normed, positions, cache)
    x = x + attended
    normed = rms_norm(x, params.post_attention_layernorm, config.rms_norm_eps)
    if isinstance(params.mlp, MLPParams):
        with jax.named_scope("mlp"):
            y = summed(mlp(params.mlp, normed, config.hidden_act), options.parallelism, "tensor")
            return x + y, cache, None
    with jax.named_scope("moe"):
        y, routing = moe_block(params.mlp, normed, positions.valid, options, replay)
    return x + y, cache, routing


def attention_block(
    params: AttentionParams,
    x: jax.Array,
    positions: TokenPositions,
    cache: LayerCache | None,
    options: StepOptions,
) -> tuple[jax.Array, LayerCache | None]:
    """Grouped-query attention from normed x [B, S, H] to itself and to the cache.

    Projections, RMSNorm of q and k over D, RoPE, the cache, attention, the output's projection.

    Returns:
      [B, S, H], and the cache with these tokens, or None without one.
    """
    config = options.config
    B, S, _ = x.shape
    D, eps = config.head_dim, config.rms_norm_eps
    q = linear(x, *params.q_proj).reshape(B, S, -1, D)
    k = linear(x, *params.k_proj).reshape(B, S, -1, D)
    v = linear(x, *params.v_proj).reshape(B, S, -1, D)
    q = rms_norm(q, params.q_norm, eps).swapaxes(1, 2)  # [B, heads, S, D]
    k = rms_norm(k, params.k_norm, eps).swapaxes(1, 2)  # [B, kv, S, D]
    v = v.swapaxes(1, 2)
    q, k = apply_rope(q, *positions.rope), apply_rope(k, *positions.rope)

    slots, valid = positions.slots, positions.valid
    own_keys = cache is None or options.empty_cache
    if cache is not None:
        (keys, values), key_slots, cache = extend(
            cache,
            LayerCache(k, v),
            slots,
            valid,
            positions.lengths,
            config.window,
            platform_ops(options.platform),
        )
    if own_keys:
        keys, values, key_slots = k, v, jnp.where(valid, slots, -1)
    attended = attention(
        q,
        keys,
        values,
        query_slots=slots,
        key_slots=key_slots,
        segments=positions.segments,
        window=config.window,
        own_keys=own_keys,
        unpadded=own_keys and options.unpadded,
        backend=options.attention_backend,
        platform=options.platform,
        phase=options.phase,
    )
    attended = attended.swapaxes(1, 2).reshape(B, S, -1)
    return linear_of_split(attended, params.o_proj, options.parallelism), cache


def moe_block(
    params: MoeParams,
    x: jax.Array,
    valid: jax.Array,
    options: StepOptions,
    replay: RoutingTrace | None = None,
) -> tuple[jax.Array, Routing]:
    """Sends each token of normed x [B, S, H] to K of E experts, and adds their weighted outputs.

    Args:
      params: the block's.
      x: [B, S, H].
      valid: [B, S] bool; padding is routed nowhere and returns zeros.
      options: how to compute it.
      replay: this layer's experts for these B * S tokens, in place of the router's choice.

    Returns:
      [B, S, H] and the Routing of the B * S tokens.
    """
    config = options.config
    tokens = x.reshape(-1, x.shape[-1])  # [T, H]
    how = {
        "norm_topk_prob": config.norm_topk_prob,
        "valid": valid.reshape(-1),
        "weights_dtype": x.dtype if config.router_dtype == "model" else jnp.float32,
    }
    with jax.named_scope("router"):
        logits = router_logits(tokens, params.gate.weight, dtype=config.router_dtype)  # [T, E]
        if replay is None:
            ops = platform_ops(options.platform)
            routing = route(logits, config.num_experts_per_tok, ops=ops, **how)
        else:
            routing = replay_route(logits, replay.expert_ids, replay.expert_weights, **how)
    with jax.named_scope("experts"):
        compute = scoped(routed_experts, options)
        y = compute(params._replace(gate=None), tokens, routing.ids, routing.weights)  # [T, H]
    return y.reshape(x.shape), routing


def routed_experts(
    params: MoeParams,
    tokens: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    options: StepOptions,
) -> jax.Array:
    """What an MoE block does once tokens [T, H] have their expert_ids and expert_weights [T, K]."""
    config, fc1, fc2 = options.config, params.fc1_latent_proj, params.fc2_latent_proj
    shared = params.shared_experts
    return experts(
        tokens,
        params.experts,
        expert_ids,
        expert_weights,
        fc1_latent_proj=None if fc1 is None else fc1.weight,
        fc2_latent_proj=None if fc2 is None else fc2.weight,
        shared_experts=None if shared is None else SharedExperts(*(p.weight for p in shared)),
        activation=config.hidden_act,
        backend=options.experts_backend,
        platform=options.platform,
        phase=options.phase,
        chunk=config.moe_chunk_max_len,
        parallelism=options.parallelism,
    )


def scoped(block: Callable, options: StepOptions) -> Callable:
    """`block` with these options, as one superkernel region where the config asks for its scope.

    Args:
      block: run_layers, attention_block or routed_experts: a function of parameters, arrays and
        `options`. Routing stays outside the experts' region.
      options: the block's.
    """
    name = {run_layers: "model", attention_block: "attention", routed_experts: "moe"}[block]
    scope = configured_scope(options.config, name, phase=options.phase, platform=options.platform)
    return scope(functools.partial(block, options=options))
