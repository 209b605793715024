"""Parameters as a flat mapping of dotted names to arrays, and back into a model.

The names, with Hugging Face's [out, in] shapes:
embed_tokens.weight, norm.weight, lm_head.weight (absent when tied), and in layers.N:
input_layernorm.weight, post_attention_layernorm.weight, self_attn.{q,k,v,o}_proj.weight (and
.bias), self_attn.{q,k}_norm.weight, then mlp.gate.weight [E, H], mlp.experts.gate_up
[E, 2, I, H], mlp.experts.down [E, H, I], or for a dense layer mlp.{gate,up,down}_proj.weight.

A parameter that the config's quantization_config says is FP8 is two arrays, for BlockScaledFp8:
NAME.values [..., out, in] float8_e4m3fn and NAME.scales [..., ceil(out / rows), ceil(in / columns)]
float32.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import Qwen3MoeConfig
from moe_jax.model import Qwen3Moe
from moe_jax.modules import named_params
from moe_jax.quantization import SCALES, VALUES


def parameter_shapes(config: Qwen3MoeConfig, dtype=jnp.bfloat16) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and dtype of every array; allocates nothing. `dtype` is that of plain ones."""
    return {
        name: jax.ShapeDtypeStruct(param.shape, param.dtype)
        for name, param in named_params(Qwen3Moe(config, rngs=None, dtype=dtype)).items()
    }


def parameter_count(config: Qwen3MoeConfig) -> int:
    """How many numbers the model holds; scales are none."""
    return sum(struct.size for struct in _counted(config).values())


def active_parameter_count(config: Qwen3MoeConfig) -> int:
    """How many of them one token uses: K of E experts in each MoE layer."""
    return sum(
        struct.size * config.num_experts_per_tok // config.num_experts
        if ".experts." in name
        else struct.size
        for name, struct in _counted(config).items()
    )


def _counted(config: Qwen3MoeConfig) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = parameter_shapes(config)
    return {name: struct for name, struct in shapes.items() if not name.endswith(SCALES)}


def to_arrays(model: Qwen3Moe) -> dict[str, jax.Array]:
    """The model's parameters by name; the arrays themselves, no copies."""
    return {name: _value(param) for name, param in named_params(model).items()}


def _value(param: nnx.Param) -> jax.Array:
    """param.get_value(), which takes 12 us of the host, for a plain array in 0.3."""
    is_plain = type(param) is nnx.Param and not (param.ref or param.has_metadata("on_get_value"))
    return param.get_raw_value() if is_plain else param.get_value()


def from_arrays(config: Qwen3MoeConfig, arrays: Mapping[str, jax.Array]) -> Qwen3Moe:
    """A model that holds these arrays, without copying them.

    Raises:
      ValueError: names are missing or unexpected, or shapes do not fit, or values and scales have
        other dtypes than BlockScaledFp8's; the message lists all.
      NotImplementedError: a quantisation other than FP8 in blocks.
    """
    model = Qwen3Moe(config, rngs=None)
    params = named_params(model)
    problems = [f"missing: {name}" for name in params.keys() - arrays.keys()]
    problems += [f"unexpected: {name}" for name in arrays.keys() - params.keys()]
    for name, param in params.items():
        if name not in arrays:
            continue
        found = arrays[name]
        if tuple(found.shape) != tuple(param.shape):
            problems.append(f"{name} has shape {tuple(found.shape)}; expected {tuple(param.shape)}")
        if name.endswith((VALUES, SCALES)) and found.dtype != param.dtype:
            problems.append(f"{name} has dtype {found.dtype}; expected {param.dtype}")
    if problems:
        raise ValueError("parameters do not fit the config:\n  " + "\n  ".join(sorted(problems)))
    for name, param in params.items():
        param.set_value(arrays[name])
    return model
