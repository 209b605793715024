"""NNX modules that hold the parameters and compute nothing; params_of gives them to the functions.

Attribute names are Hugging Face's, so a parameter's dotted name is its path in the model. Each
module's `Params` is the NamedTuple that the functions of decoder.py and layers.py take.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import Qwen3MoeConfig
from moe_jax.decoder import AttentionParams, LayerParams, MoeParams
from moe_jax.experts import ExpertWeights
from moe_jax.layers import LinearParams, MLPParams
from moe_jax.quantization import block_of, is_quantised
from pallas_kernels.block_scaled_fp8 import VALUES_DTYPE, BlockScaledFp8, quantise, scales_shape

# Parameters by name, of a part of a model -> the same on other devices.
Place = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]


def params_of(module):
    """The parameters of a module as its Params, all the way down; the arrays, not copies of them.

    A part that the config leaves out (a bias, shared experts) is None; a norm or an embedding is
    its weight.
    """
    if module is None:
        return None
    if isinstance(module, nnx.Variable):
        return module[...]
    if isinstance(module, tuple):  # a block's sizes
        return module
    if isinstance(module, nnx.List):
        return tuple(map(params_of, module))
    if module.Params is None:
        return params_of(module.weight)
    parts = vars(module)
    return module.Params(
        **{name: params_of(parts[name]) for name in _fields(module.Params) if name in parts}
    )


def named_params(
    module: nnx.Module, prefix: str = "", found: dict[str, nnx.Param] | None = None
) -> dict[str, nnx.Param]:
    """Every parameter of a module by its dotted name, in nnx.state's order.

    Without nnx.state, because that takes the host 40 ms for 48 layers, and each `stream` asks.

    Args:
      module: the model, or a part of one. Attributes that begin with _ hold no parameters.
      prefix: before each name, with its dot.
      found: a mapping that takes them in.
    """
    found = {} if found is None else found
    in_order = enumerate(module) if isinstance(module, nnx.List) else sorted(vars(module).items())
    for key, part in in_order:
        name = f"{prefix}{key}"
        if part is None or str(key).startswith("_"):
            continue
        if isinstance(part, nnx.Module):
            named_params(part, f"{name}.", found)
        elif isinstance(part, nnx.Param):
            found[name] = part
    return found


def _fields(params_type) -> tuple[str, ...]:
    return getattr(params_type, "_fields", None) or tuple(params_type.__dataclass_fields__)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: jax.Array, std: float, shape: tuple[int, ...], dtype) -> jax.Array:
    # Compiled, because then a large array is made in place on its device.
    return (jax.random.normal(key, shape, dtype) * std).astype(dtype)


def normal_param(
    config: Qwen3MoeConfig, rngs: nnx.Rngs | None, shape: tuple[int, ...], dtype
) -> nnx.Param:
    """A parameter drawn from a normal distribution of the config's initializer_range.

    Without rngs it is a shape and a dtype only, as are all parameters of a module without rngs:
    that takes a tenth of the time of tracing the initialisation.
    """
    if rngs is None:
        return nnx.Param(jax.ShapeDtypeStruct(shape, dtype))
    return nnx.Param(_normal(rngs.params(), config.initializer_range, shape, dtype))


def constant_param(value: float, rngs: nnx.Rngs | None, N: int, dtype) -> nnx.Param:
    """A parameter [N] of one value; a shape and a dtype only without rngs."""
    return nnx.Param(
        jax.ShapeDtypeStruct((N,), dtype) if rngs is None else jnp.full(N, value, dtype)
    )


class ScaledWeight(nnx.Module):
    """A weight in FP8, in place of a plain parameter: its values and its scales."""

    Params = BlockScaledFp8

    def __init__(self, weight: BlockScaledFp8):
        self.values = nnx.Param(weight.values)
        self.scales = nnx.Param(weight.scales)
        self.block = weight.block


_quantise = jax.jit(quantise, static_argnums=1)


def to_config_format(module: nnx.Module, config: Qwen3MoeConfig, name: str) -> nnx.Module:
    """The module with a ScaledWeight for each parameter that quantization_config says is FP8.

    Args:
      module: a layer, or a part of one; it is changed.
      config: the model's.
      name: the module's in the model, as "layers.0".
    """
    block = block_of(config.quantization_config)
    if block is None:
        return module
    for key, part in list(vars(module).items()):
        own = f"{name}.{key}"
        if isinstance(part, nnx.Module):
            to_config_format(part, config, own)
        elif isinstance(part, nnx.Param) and is_quantised(own, config.quantization_config):
            setattr(module, key, ScaledWeight(_scaled(part.get_value(), block)))
    return module


def _scaled(weight: jax.Array | jax.ShapeDtypeStruct, block: tuple[int, int]) -> BlockScaledFp8:
    if not isinstance(weight, jax.ShapeDtypeStruct):
        return _quantise(weight, block)
    return BlockScaledFp8(
        values=jax.ShapeDtypeStruct(weight.shape, VALUES_DTYPE),
        scales=jax.ShapeDtypeStruct(scales_shape(weight.shape, block), jnp.float32),
        block=block,
    )


def placed(module: nnx.Module, name: str, place: Place | None) -> nnx.Module:
    """The module with its arrays where `place` puts them; `name` is the module's in the model."""
    if place is None:
        return module
    params = named_params(module, f"{name}." if name else "")
    arrays = place({key: param.get_value() for key, param in params.items()})
    for key, param in params.items():
        param.set_value(arrays[key])
    return module


class Linear(nnx.Module):
    """weight [N_out, N_in], bias [N_out] if asked for."""

    Params = LinearParams

    def __init__(self, config, N_in: int, N_out: int, *, rngs, dtype, bias: bool = False):
        self.weight = normal_param(config, rngs, (N_out, N_in), dtype)
        self.bias = constant_param(0, rngs, N_out, dtype) if bias else None


class RMSNorm(nnx.Module):
    """weight [N]."""

    Params = None

    def __init__(self, N: int, *, rngs: nnx.Rngs | None, dtype):
        self.weight = constant_param(1, rngs, N, dtype)


class Embedding(nnx.Module):
    """weight [V, H]."""

    Params = None

    def __init__(self, config: Qwen3MoeConfig, *, rngs: nnx.Rngs | None, dtype):
        shape = (config.vocab_size, config.hidden_size)
        self.weight = normal_param(config, rngs, shape, dtype)


class MLP(nnx.Module):
    """gate_proj, up_proj [N, H], down_proj [H, N]: a dense layer's MLP, or the shared experts."""

    Params = MLPParams

    def __init__(self, config: Qwen3MoeConfig, N: int, *, rngs: nnx.Rngs | None, dtype):
        H, options = config.hidden_size, {"rngs": rngs, "dtype": dtype}
        self.gate_proj = Linear(config, H, N, **options)
        self.up_proj = Linear(config, H, N, **options)
        self.down_proj = Linear(config, N, H, **options)


class Attention(nnx.Module):
    """q, k, v and o projections, and the norms of q and k over D."""

    Params = AttentionParams

    def __init__(self, config: Qwen3MoeConfig, *, rngs: nnx.Rngs | None, dtype):
        H, D = config.hidden_size, config.head_dim
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        options = {"rngs": rngs, "dtype": dtype, "bias": config.attention_bias}
        self.q_proj = Linear(config, H, heads * D, **options)
        self.k_proj = Linear(config, H, kv * D, **options)
        self.v_proj = Linear(config, H, kv * D, **options)
        self.o_proj = Linear(config, heads * D, H, **options)
        self.q_norm = RMSNorm(D, rngs=rngs, dtype=dtype)
        self.k_norm = RMSNorm(D, rngs=rngs, dtype=dtype)


class Experts(nnx.Module):
    """The one stored copy: gate_up [E, 2, I, L] (gate first), down [E, L, I]; L is H by default."""

    Params = ExpertWeights

    def __init__(self, config: Qwen3MoeConfig, *, rngs: nnx.Rngs | None, dtype):
        E, I = config.num_experts, config.moe_intermediate_size
        L = config.moe_latent_size or config.hidden_size
        self.gate_up = normal_param(config, rngs, (E, 2, I, L), dtype)
        self.down = normal_param(config, rngs, (E, L, I), dtype)


class SparseMoe(nnx.Module):
    """Router, experts, and what the config puts around them: latent projections, shared experts."""

    Params = MoeParams

    def __init__(self, config: Qwen3MoeConfig, *, rngs: nnx.Rngs | None, dtype):
        options = {"rngs": rngs, "dtype": dtype}
        H, L, N = (
            config.hidden_size,
            config.moe_latent_size,
            config.moe_shared_expert_intermediate_size,
        )
        # Named as in Hugging Face's files: this gate is the router.
        self.gate = Linear(config, H, config.num_experts, **options)
        self.experts = Experts(config, **options)
        self.fc1_latent_proj = None if L is None else Linear(config, H, L, **options)
        self.fc2_latent_proj = None if L is None else Linear(config, L, H, **options)
        self.shared_experts = None if N is None else MLP(config, N, **options)


class DecoderLayer(nnx.Module):
    """Attention and an MLP, each with the norm before it; the MLP has experts or is dense."""

    Params = LayerParams

    def __init__(self, config: Qwen3MoeConfig, layer: int, *, rngs: nnx.Rngs | None, dtype):
        H, options = config.hidden_size, {"rngs": rngs, "dtype": dtype}
        self.input_layernorm = RMSNorm(H, **options)
        self.self_attn = Attention(config, **options)
        self.post_attention_layernorm = RMSNorm(H, **options)
        self.mlp = (
            SparseMoe(config, **options)
            if config.is_moe_layer(layer)
            else MLP(config, config.intermediate_size, **options)
        )
