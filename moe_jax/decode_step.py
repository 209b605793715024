"""All layers of one call: the blocks of decoder.py, or a decode step in the kernels' few launches.

    blocks              decoder.run_layers: any call; its experts and attention are ops of their own
    pallas              pallas_kernels/decode_step: one new token a row, a layer in few launches
    pallas_interpret    the same kernels on a CPU

The kernels take attention, router and experts of a layer together. So all layers are an op of their
own, "layers", and the table of moe_jax.dispatch chooses its backend. Read `layers` first, then
`_by_kernels`. What the kernels leave to the blocks is in layers_request.py.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax.cache import LayerCache
from moe_jax.config import Qwen3MoeConfig
from moe_jax.decoder import (
    Caches,
    LayerParams,
    StepOptions,
    TokenPositions,
    run_layers,
    scoped,
)
from moe_jax.dispatch import Backend, resolve_backend
from moe_jax.layers_request import (
    OF_CALL,
    OF_MESH,
    OF_MODEL,
    QUANTISED,
    SIZE_MULTIPLE,
    LayersCall,
    LayersRequest,
)
from moe_jax.parallel_layers import run_on_mesh
from moe_jax.routing import Routing
from moe_jax.superkernel import configured_scope
from moe_jax.traces import RoutingTrace
from pallas_kernels.decode_step import (
    LayerShard,
    LayerStep,
    LayerWeights,
    Residual,
    RowPositions,
    decode_layers,
)


def layers(
    params: tuple[LayerParams, ...],
    x: jax.Array,
    positions: TokenPositions,
    caches: Caches | None,
    replay: RoutingTrace | None,
    options: StepOptions,
) -> tuple[list[jax.Array], Caches | None, list[Routing]]:
    """Runs all layers in the backend that the table chooses; arguments and results as run_layers'.

    A call of the phase "decode" has S = 1, caches, and no segments.

    Raises:
      ValueError: no such backend.
      NotImplementedError: the backend cannot do this; the message says what and who can.
    """
    call = LayersCall(params, x, positions, caches, replay, options)
    request = LayersRequest.of(
        options.config,
        platform=options.platform,
        phase=options.phase,
        T=x.shape[0] * x.shape[1],
        C=0 if caches is None else caches[0].keys.shape[2],
        dtype=jnp.dtype(x.dtype).name,
        needs=tuple(word for word, has in (QUANTISED | OF_CALL).items() if has(call)),
        parallelism=options.parallelism,
    )
    choice = resolve_backend(request, LAYERS_BACKENDS, options.layers_backend)
    return LAYERS_BACKENDS[choice.backend].run(*call)


def _by_blocks(params, x, positions, caches, replay, options: StepOptions):
    rope = tuple(table.astype(x.dtype) for table in positions.rope)  # once for all layers
    positions = positions._replace(rope=rope)
    run, arrays = scoped(run_layers, options), (params, x, positions, caches, replay)
    if options.parallelism is None:
        return run(*arrays)
    return run_on_mesh(run, options.parallelism, options.phase, *arrays)


def _by_kernels(
    params: tuple[LayerParams, ...],
    x: jax.Array,
    positions: TokenPositions,
    caches: Caches,
    replay: None,
    options: StepOptions,
    interpret: bool = False,
) -> tuple[list[jax.Array], Caches, list[Routing]]:
    """run_layers for one new token of each row, x [B, 1, H]."""
    run, arrays = functools.partial(_kernels, options, interpret), (params, x, positions, caches)
    if options.parallelism is None:
        return run(*arrays, replay)
    return run_on_mesh(run, options.parallelism, options.phase, *arrays, replay)


def _kernels(options: StepOptions, interpret: bool, params, x, positions, caches, replay):
    """_by_kernels on one device, which may be one of a mesh."""
    del replay
    config = options.config
    run = functools.partial(
        decode_layers,
        K=config.num_experts_per_tok,
        eps=config.rms_norm_eps,
        norm_topk_prob=config.norm_topk_prob,
        launches=_launches(config),
        shard=_shard(options, params),
        interpret=interpret,
    )

    scope = configured_scope(config, "model", phase=options.phase, platform=options.platform)
    weights, rows = tuple(map(_layer_weights, params)), _row_positions(positions, x.shape[0])
    steps = scope(run)(Residual.of(x[:, 0]), weights, tuple(map(tuple, caches)), rows)

    outputs = [step.residual.total(rows.valid)[:, None] for step in steps]
    caches = tuple(LayerCache(step.keys, step.values) for step in steps)
    return outputs, caches, list(map(_routing, steps))


def _launches(config: Qwen3MoeConfig) -> str:
    """A layer is one launch, or is cut where a superkernel scope asks for a part of it."""
    parts = config.enable_superkernel and config.superkernel_scope in ("attention", "moe")
    return "blocks" if parts else "layer"


def _shard(options: StepOptions, params: tuple[LayerParams, ...]) -> LayerShard | None:
    """What of each layer this device of the mesh has; None for all of it."""
    parallelism = options.parallelism
    axes = (
        [] if parallelism is None else [a for a in ("expert", "tensor") if parallelism.size(a) > 1]
    )
    if not axes:
        return None
    own = params[0].mlp.experts.gate_up.shape[0]
    return LayerShard(
        first_expert=jax.lax.axis_index("expert") * own,
        experts_over=tuple(axes),
        heads_over=("tensor",) if "tensor" in axes and parallelism.split_heads else (),
    )


def _row_positions(positions: TokenPositions, B: int) -> RowPositions:
    """Of the one new token of each row; a table of one row serves all."""
    cos, sin = (
        jnp.broadcast_to(table[:, 0].astype(jnp.float32), (B, table.shape[-1]))
        for table in positions.rope
    )
    valid = positions.valid[:, 0].astype(jnp.int32)
    return RowPositions(cos=cos, sin=sin, lengths=positions.lengths, valid=valid)


def _layer_weights(layer: LayerParams) -> LayerWeights:
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


def _routing(step: LayerStep) -> Routing:
    """With the weights of padding, which the kernels leave as they are, as zeros."""
    return Routing(
        ids=step.ids,
        weights=jnp.where(step.ids >= 0, step.weights, 0),
        logits=step.logits,
        probabilities=jax.nn.softmax(step.logits, axis=-1),
    )


_KERNELS = {
    "run": _by_kernels,
    "rel_error": {"bfloat16": 1e-2},
    "phases": ("decode",),
    "activations": ("silu", "swish"),
    "size_multiple": SIZE_MULTIPLE,
    "features": tuple(QUANTISED),
    "gradients": False,
}

# Errors are those of two layers; more layers give more.
LAYERS_BACKENDS: dict[str, Backend] = {
    "blocks": Backend(
        run=_by_blocks,
        what="the blocks of decoder.py, one after the other; experts and attention as chosen",
        rel_error={"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3},
        features=(*OF_MODEL, *OF_MESH, *QUANTISED, *OF_CALL),
    ),
    "pallas": Backend(
        what="the decode step of pallas_kernels: a layer in one launch up to 8 rows",
        platforms=("cuda",),
        **_KERNELS,
    ),
    "pallas_interpret": Backend(
        what="the same kernels in Pallas's interpret mode: slow, for checking on a CPU",
        platforms=("cpu",),
        **(_KERNELS | {"run": functools.partial(_by_kernels, interpret=True)}),
    ),
}
