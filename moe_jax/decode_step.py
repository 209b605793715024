"""All layers of one call: the blocks of decoder.py, or a decode step in the kernels' few launches.

    blocks              decoder.run_layers: any call; its experts and attention are ops of their own
    pallas              pallas_kernels/decode_step: one new token a row, a layer in few launches
    pallas_interpret    the same kernels on a CPU

The kernels take attention, router and experts of a layer together. So all layers are an op of their
own, "layers", and the table of moe_jax.dispatch chooses its backend. Read `layers` first, then
`_by_kernels`. What the kernels leave to the blocks is in _OF_MODEL and _OF_CALL.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.cache import LayerCache
from moe_jax.config import Qwen3MoeConfig
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
from moe_jax.parallel_layers import run_on_mesh
from moe_jax.routing import Routing
from moe_jax.superkernel import configured_scope
from moe_jax.traces import RoutingTrace
from pallas_kernels.block_scaled_fp8 import (
    BLOCK,
    BlockScaledFp8,
    holds_fp8,
    in_whole_blocks,
    is_fp8,
)
from pallas_kernels.decode_step import (
    LayerStep,
    LayerWeights,
    Residual,
    RowPositions,
    decode_layer,
)
from pallas_kernels.decode_step.input_checks import HEAD_DIM, MAX_ROWS, SLOTS_MULTIPLE
from pallas_kernels.mosaic.device import HOPPER, capability_of, device_kind

_MULTIPLE = SLOTS_MULTIPLE  # of H and I, too

# What only the blocks take, in words, and whether it holds for (config, B, C, platform).
_OF_MODEL: dict[str, Callable[[Qwen3MoeConfig, int, int, str], bool]] = {
    "dense layers": lambda config, *_: len(config.moe_layers) < config.num_hidden_layers,
    "latent projections": lambda config, *_: config.moe_latent_size is not None,
    "shared experts": lambda config, *_: config.moe_shared_expert_intermediate_size is not None,
    "biases in attention": lambda config, *_: config.attention_bias,
    "router logits in the model's dtype": lambda config, *_: config.router_dtype == "model",
    f"heads of another size than {HEAD_DIM}": lambda config, *_: config.head_dim != HEAD_DIM,
    "more than 64 query heads for a key": lambda config, *_: (
        config.num_attention_heads > 64 * config.num_key_value_heads
    ),
    "more than 512 experts, or no multiple of 8": lambda config, *_: (
        config.num_experts > 512 or config.num_experts % 8 > 0
    ),
    "more than 32 experts for a token": lambda config, *_: config.num_experts_per_tok > 32,
    f"more than {MAX_ROWS} rows": lambda config, B, *_: B > MAX_ROWS,
    "a cache of more slots than the window": lambda config, B, C, _: (
        config.window is not None and config.window < C
    ),
    "a GPU that is no Hopper": lambda config, B, C, platform: (
        platform == "cuda" and capability_of(device_kind()) not in (HOPPER, None)
    ),
}


class _Call(NamedTuple):
    """Arguments of `layers`."""

    params: tuple[LayerParams, ...]
    x: jax.Array
    positions: TokenPositions
    caches: Caches | None
    replay: RoutingTrace | None
    options: StepOptions

    @property
    def mixes_dtypes(self) -> bool:
        weights = jax.tree.leaves((self.params, self.caches), is_leaf=is_fp8)
        return any(weight.dtype != self.x.dtype for weight in weights if not is_fp8(weight))

    @property
    def fp8_weights(self) -> list[BlockScaledFp8]:
        return [w for w in jax.tree.leaves(self.params, is_leaf=is_fp8) if is_fp8(w)]

    @property
    def has_whole_blocks(self) -> bool:
        """Whether all FP8 weights are as the kernels take them."""
        return all(map(in_whole_blocks, self.fp8_weights))

    @property
    def mixes_formats(self) -> bool:
        """Whether weights that the kernels multiply as one are of two formats."""
        groups = [layer.self_attn[:3] for layer in self.params]
        groups += [layer.mlp.experts for layer in self.params if isinstance(layer.mlp, MoeParams)]
        formats = [[is_fp8(w) for w in jax.tree.leaves(group, is_leaf=is_fp8)] for group in groups]
        return any(any(found) and not all(found) for found in formats)

    @property
    def names_backends(self) -> bool:
        return backend_named("experts", self.options.experts_backend) or backend_named(
            "attention", self.options.attention_backend
        )


# Of one call, what the kernels have too.
_QUANTISED: dict[str, Callable[[_Call], bool]] = {
    "quantised weights": lambda call: holds_fp8(call.params),
}
ON_A_MESH = "a mesh of devices"
# Likewise, what only the blocks take.
_OF_CALL: dict[str, Callable[[_Call], bool]] = {
    f"FP8 weights in other blocks than whole ones of {BLOCK[0]} x {BLOCK[1]}": lambda call: (
        not call.has_whole_blocks
    ),
    "FP8 in some, not all, of q, k and v, or of gate_up and down": lambda call: call.mixes_formats,
    "a replay": lambda call: call.replay is not None,
    "a backend named for its experts or attention": lambda call: call.names_backends,
    "parameters or a cache of another dtype than its inputs": lambda call: call.mixes_dtypes,
    ON_A_MESH: lambda call: call.options.parallelism is not None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersRequest(Request):
    """One run of all layers, for moe_jax.dispatch; T is B * S.

    Attributes:
      H, I: the model's size and an expert's.
      C: slots of a cache's row; 0 without a cache.
      needs: words in _OF_MODEL, _QUANTISED and _OF_CALL that hold.
    """

    op: ClassVar[str] = "layers"
    H: int
    I: int
    C: int = 0
    needs: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        config: Qwen3MoeConfig,
        *,
        platform: str,
        phase: str,
        T: int,
        C: int,
        dtype: str,
        needs: tuple[str, ...] = (),
    ) -> "LayersRequest":
        """A model's; `needs` are the call's own."""
        of_model = [word for word, has in _OF_MODEL.items() if has(config, T, C, platform)]
        return cls(
            platform=platform,
            phase=phase,
            T=T,
            dtype=dtype,
            activation=config.hidden_act,
            H=config.hidden_size,
            I=config.moe_intermediate_size,
            C=C,
            needs=(*of_model, *needs),
        )

    @property
    def sizes(self) -> dict[str, int]:
        return {"H": self.H, "I": self.I, "C": self.C}

    @property
    def features(self) -> tuple[str, ...]:
        return self.needs


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
    call = _Call(params, x, positions, caches, replay, options)
    request = LayersRequest.of(
        options.config,
        platform=options.platform,
        phase=options.phase,
        T=x.shape[0] * x.shape[1],
        C=0 if caches is None else caches[0].keys.shape[2],
        dtype=jnp.dtype(x.dtype).name,
        needs=tuple(word for word, has in (_QUANTISED | _OF_CALL).items() if has(call)),
    )
    choice = resolve_backend(request, LAYERS_BACKENDS, options.layers_backend)
    return LAYERS_BACKENDS[choice.backend].run(*call)


def _by_blocks(params, x, positions, caches, replay, options: StepOptions):
    rope = tuple(table.astype(x.dtype) for table in positions.rope)  # once for all layers
    positions = positions._replace(rope=rope)
    run, arrays = scoped(run_layers, options), (params, x, positions, caches, replay)
    return run(*arrays) if options.parallelism is None else run_on_mesh(run, options, *arrays)


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
    del replay
    config = options.config
    decode = functools.partial(
        decode_layer,
        K=config.num_experts_per_tok,
        eps=config.rms_norm_eps,
        norm_topk_prob=config.norm_topk_prob,
        launches=_launches(config),
        interpret=interpret,
    )

    def run(weights, residual, rows, caches) -> list[LayerStep]:
        steps = []
        for index, (own, cache) in enumerate(zip(weights, caches, strict=True)):
            with jax.named_scope(f"layer_{index}"):
                step = decode(residual, own, *cache, rows)
            residual = step.residual
            steps.append(step)
        return steps

    scope = configured_scope(config, "model", phase=options.phase, platform=options.platform)
    weights, rows = tuple(map(_layer_weights, params)), _row_positions(positions, x.shape[0])
    steps = scope(run)(weights, Residual.of(x[:, 0]), rows, caches)

    outputs = [step.residual.total(rows.valid)[:, None] for step in steps]
    caches = tuple(LayerCache(step.keys, step.values) for step in steps)
    return outputs, caches, list(map(_routing, steps))


def _launches(config: Qwen3MoeConfig) -> str:
    """A layer is one launch, or is cut where a superkernel scope asks for a part of it."""
    parts = config.enable_superkernel and config.superkernel_scope in ("attention", "moe")
    return "blocks" if parts else "layer"


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
    "size_multiple": _MULTIPLE,
    "features": tuple(_QUANTISED),
    "gradients": False,
}

# Errors are those of two layers; more layers give more.
LAYERS_BACKENDS: dict[str, Backend] = {
    "blocks": Backend(
        run=_by_blocks,
        what="the blocks of decoder.py, one after the other; experts and attention as chosen",
        rel_error={"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3},
        features=(*_OF_MODEL, *_QUANTISED, *_OF_CALL),
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
