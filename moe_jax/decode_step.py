"""All layers of one call: the blocks of decoder.py, or a decode step in the kernels' few launches.

The kernels' step (pallas_kernels/decode_step) computes what the blocks compute, with fewer roundings
on the way. It takes attention, router and experts together, so it is an op of its own, and chosen
by the table of moe_jax.dispatch like the others.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe_jax.cache import LayerCache
from moe_jax.decoder import (
    Caches,
    LayerParams,
    MoeParams,
    StepOptions,
    TokenPositions,
    run_layers,
    scoped,
)
from moe_jax.dispatch import Backend, Request, backend_named, resolve_backend
from moe_jax.routing import Routing
from moe_jax.superkernel import configured_scope
from moe_jax.traces import RoutingTrace
from pallas_kernels.decode_step import LayerWeights, Residual, RowPositions, decode_layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersRequest(Request):
    """One run of all layers, for moe_jax.dispatch; T is B * S.

    Attributes:
      B: rows.
      D, H, I: sizes of a head, of the model and of an expert.
      C: slots of a cache's row; 0 without a cache.
      needs: what else the call or the config asks for.
    """

    op: ClassVar[str] = "layers"
    B: int
    D: int
    H: int
    I: int
    C: int = 0
    needs: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        return {"D": self.D, "C": self.C, "H": self.H, "I": self.I}

    @property
    def features(self) -> tuple[str, ...]:
        return self.needs


_DENSE, _LATENT, _SHARED = "dense layers", "latent projections", "shared experts"
_BIAS, _ROUTER, _REPLAY = "biases in attention", "router logits of the model's dtype", "a replay"
_WIDE, _SEGMENTS = "a cache of more slots than the window", "segments"
_NAMED = "a backend named for its experts or attention"
_MANY, _HEAD, _NO_CACHE = "more than 64 rows", "a head of another size than 128", "no cache"
_EXPERTS = "a number of experts that is no multiple of 8, or above 512"
_GROUP = "more than 64 query heads for a key"


def _needs(params, positions, caches, replay, options: StepOptions) -> tuple[str, ...]:
    """What the kernels' step does not have, of what this call needs."""
    config, C = options.config, 0 if caches is None else caches[0].keys.shape[2]
    moe = [layer.mlp for layer in params if isinstance(layer.mlp, MoeParams)]
    named = backend_named("experts", options.experts_backend)
    named |= backend_named("attention", options.attention_backend)
    asked = {
        _NO_CACHE: caches is None,
        _DENSE: len(moe) < len(params),
        _LATENT: any(mlp.fc1_latent_proj is not None for mlp in moe),
        _SHARED: any(mlp.shared_experts is not None for mlp in moe),
        _BIAS: any(layer.self_attn.q_proj.bias is not None for layer in params),
        _ROUTER: config.router_dtype == "model",
        _REPLAY: replay is not None,
        _SEGMENTS: positions.segments is not None,
        _WIDE: config.window is not None and config.window < C,
        _NAMED: named,
        _MANY: positions.slots.shape[0] > 64,
        _HEAD: config.head_dim != 128,
        _EXPERTS: config.num_experts % 8 > 0 or config.num_experts > 512,
        _GROUP: config.num_attention_heads > 64 * config.num_key_value_heads,
    }
    return tuple(word for word, is_asked in asked.items() if is_asked)


def _blocks(params, x, positions, caches, replay, options: StepOptions):
    return scoped(run_layers, options)(params, x, positions, caches, replay)


def _fused(
    params: tuple[LayerParams, ...],
    x: jax.Array,
    positions: TokenPositions,
    caches: Caches,
    replay: None,
    options: StepOptions,
    interpret: bool = False,
) -> tuple[list[jax.Array], Caches, list[Routing]]:
    """run_layers for one new token a row; where a superkernel scope asks, a layer is cut there."""
    del replay
    config, (B, _, _) = options.config, x.shape
    cut = config.enable_superkernel and config.superkernel_scope in ("attention", "moe")
    run = functools.partial(
        decode_layer,
        K=config.num_experts_per_tok,
        eps=config.rms_norm_eps,
        norm_topk_prob=config.norm_topk_prob,
        launches="blocks" if cut else "layer",
        interpret=interpret,
    )
    cos, sin = (
        jnp.broadcast_to(table[:, 0], (B, config.head_dim)).astype(jnp.float32)
        for table in positions.rope
    )
    valid = positions.valid[:, 0]
    rows = RowPositions(cos, sin, positions.lengths, valid.astype(jnp.int32))

    def layers(params, x, rows, caches):
        residual, outputs, updated, steps = Residual.of(x[:, 0]), [], [], []
        for index, (layer, cache) in enumerate(zip(params, caches, strict=True)):
            with jax.named_scope(f"layer_{index}"):
                step = run(residual, layer_weights(layer), *cache, rows)
            residual = step.residual
            outputs.append(residual)
            updated.append(LayerCache(step.keys, step.values))
            steps.append((step.ids, step.weights, step.logits))
        return outputs, tuple(updated), steps

    scope = configured_scope(config, "model", phase=options.phase, platform=options.platform)
    outputs, updated, steps = scope(layers)(params, x, rows, caches)
    routings = [
        Routing(
            ids=ids,
            weights=jnp.where(ids >= 0, weights, 0),
            logits=logits,
            probabilities=jax.nn.softmax(logits, axis=-1),
        )
        for ids, weights, logits in steps
    ]
    return [residual.total(valid)[:, None] for residual in outputs], updated, routings


def layer_weights(layer: LayerParams) -> LayerWeights:
    """A layer's parameters as decode_layer takes them."""
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        input_layernorm=layer.input_layernorm,
        q_proj=attention.q_proj.weight,
        k_proj=attention.k_proj.weight,
        v_proj=attention.v_proj.weight,
        q_norm=attention.q_norm,
        k_norm=attention.k_norm,
        o_proj=attention.o_proj.weight,
        post_attention_layernorm=layer.post_attention_layernorm,
        gate=mlp.gate.weight,
        gate_up=mlp.experts.gate_up,
        down=mlp.experts.down,
    )


_KERNELS = {
    "rel_error": {"bfloat16": 6e-3},
    "phases": ("decode",),
    "activations": ("silu", "swish"),
    "size_multiple": 64,
    "gradients": False,
}

LAYERS_BACKENDS: dict[str, Backend] = {
    "blocks": Backend(
        run=_blocks,
        what="the blocks of decoder.py, one after the other; experts and attention as chosen",
        rel_error={"float32": 1e-5, "bfloat16": 6e-3, "float16": 1e-3},
        features=(
            _DENSE, _LATENT, _SHARED, _BIAS, _ROUTER, _REPLAY, _SEGMENTS, _WIDE, _NAMED, _MANY,
            _HEAD, _NO_CACHE, _EXPERTS, _GROUP,
        ),
    ),
    "pallas": Backend(
        run=_fused,
        what="the decode step of pallas_kernels: a layer in one launch up to 8 rows",
        platforms=("cuda",),
        **_KERNELS,
    ),
    "pallas_interpret": Backend(
        run=functools.partial(_fused, interpret=True),
        what="the same kernels in Pallas's interpret mode: slow, for checking on a CPU",
        platforms=("cpu",),
        **_KERNELS,
    ),
}  # fmt: skip


def layers(
    params: tuple[LayerParams, ...],
    x: jax.Array,
    positions: TokenPositions,
    caches: Caches | None,
    replay: RoutingTrace | None,
    options: StepOptions,
) -> tuple[list[jax.Array], Caches | None, list[Routing]]:
    """Runs all layers in the backend that the table chooses; arguments as run_layers'.

    Raises:
      ValueError: no such backend.
      NotImplementedError: the backend cannot do this; the message says what and who can.
    """
    config, (B, S, H) = options.config, x.shape
    request = LayersRequest(
        platform=options.platform,
        phase=options.phase,
        T=B * S,
        dtype=jnp.dtype(x.dtype).name,
        activation=config.hidden_act,
        B=B,
        D=config.head_dim,
        H=H,
        I=config.moe_intermediate_size,
        C=0 if caches is None else caches[0].keys.shape[2],
        needs=_needs(params, positions, caches, replay, options),
    )
    choice = resolve_backend(request, LAYERS_BACKENDS, options.layers_backend)
    return LAYERS_BACKENDS[choice.backend].run(params, x, positions, caches, replay, options)
