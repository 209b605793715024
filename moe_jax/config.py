"""Qwen3MoeConfig: what a Qwen3-MoE model is, under Hugging Face's names and defaults."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from moe_jax import rope_spelling
from moe_jax.config_checks import ConfigError, check_config, shown
from moe_jax.json_files import TOO_DEEP, is_too_deep, local_path, read_json
from moe_jax.rope import RopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig:
    """A model's sizes and semantics. Immutable, checked when made, hashable.

    Field names and defaults are those of transformers' Qwen3MoeConfig, except:

    Attributes:
      head_dim: hidden_size // num_attention_heads where None; published models set it, and there
        heads * head_dim is not hidden_size.
      rope: theta and scaling, whichever of the two spellings config.json uses.
      sliding_window: counts only if use_sliding_window, and then for every layer: see `window`.
      mlp_only_layers: a tuple of layer indices.
      quantization_config: as in the file; moe_jax.quantization says which parameters are FP8 by it.
      router_z_loss_coef: ours; weight of the router z-loss.
      router_dtype: ours; "float32" computes the router's logits in float32 in every phase, "model"
        in the model's dtype, as Hugging Face does.
      moe_chunk_max_len: ours; MoE layers take at most this number of tokens at once, None for all.
      moe_latent_size: ours; L, the experts' width where it is not hidden_size: each token is
        projected down to L before the experts and up again after their weighted sum. None is off.
      moe_shared_expert_intermediate_size: ours; the width of an MLP beside the experts that every
        token goes through. None is off.
      enable_superkernel: ours; whether decode steps mark regions for a compiler to fuse, as
        moe_jax.superkernel says.
      superkernel_scope: ours; which regions: "moe", "attention" or "model".
      extra: every other key of config.json, kept for writing back.

    Raises:
      ConfigError: a field has a value that no model can have; the message names both.
    """

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    head_dim: int | None = None
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    num_experts: int = 128
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    norm_topk_prob: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    tie_word_embeddings: bool = False
    quantization_config: Mapping | None = dataclasses.field(default=None, hash=False)
    router_z_loss_coef: float = 0.0
    router_dtype: str = "float32"
    moe_chunk_max_len: int | None = None
    moe_latent_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    enable_superkernel: bool = False
    superkernel_scope: str = "moe"
    extra: Mapping = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self):
        if self.mlp_only_layers is None:
            object.__setattr__(self, "mlp_only_layers", ())
        elif isinstance(self.mlp_only_layers, (list, range)):
            object.__setattr__(self, "mlp_only_layers", tuple(self.mlp_only_layers))
        check_config(self)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for field in dataclasses.fields(self):
            if field.type is float and abs(value := getattr(self, field.name)) >= 2**31:
                # JAX would take an integer for an int32
                object.__setattr__(self, field.name, float(value))

    @property
    def window(self) -> int | None:
        """How many tokens a query sees, itself included; None without a sliding window."""
        return self.sliding_window if self.use_sliding_window else None

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the layer has experts; the others have one dense MLP."""
        return (
            layer not in self.mlp_only_layers
            and self.num_experts > 0
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The indices of the layers with experts."""
        return tuple(filter(self.is_moe_layer, range(self.num_hidden_layers)))

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "Qwen3MoeConfig":
        """Reads a parsed config.json, in transformers' v4 or v5 spelling.

        Raises:
          ConfigError: another model_type, an unknown RoPE kind, a malformed or impossible value, or
            more than 100 objects or lists inside each other.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"config is a {type(data).__name__}; expected a mapping of fields")
        if is_too_deep(data):
            raise ConfigError(f"config is {TOO_DEEP}")
        rest = dict(data)
        model_type = rest.pop("model_type", _MODEL_TYPE)
        if model_type != _MODEL_TYPE:
            raise ConfigError(f"model_type is {shown(model_type)}; expected {_MODEL_TYPE!r}")
        if "num_local_experts" in rest:
            experts = rest.pop("num_local_experts")
            if rest.setdefault("num_experts", experts) != experts:
                raise ConfigError(
                    f"num_experts is {shown(rest['num_experts'])} and num_local_experts is "
                    f"{shown(experts)}; expected one value for these two names of one field"
                )
        fields = {"rope": rope_spelling.take_from(rest)}
        for name in _HF_FIELDS:
            if name in rest:
                fields[name] = rest.pop(name)
        for name in _NULL_MEANS_DEFAULT:
            if name in fields and fields[name] is None:
                del fields[name]
        return cls(**fields, extra=rest)

    def to_hf(self, spelling: str = "v4") -> dict[str, Any]:
        """The config.json of this model, ready for json.dumps.

        Args:
          spelling: "v4" (rope_theta, rope_scaling, num_experts), which transformers 5 reads too,
            or "v5" (rope_parameters, num_local_experts).

        Raises:
          ConfigError: another spelling.
        """
        if spelling not in ("v4", "v5"):
            raise ConfigError(f"spelling is {spelling!r}; expected 'v4' or 'v5'")
        data = {**self.extra, "model_type": _MODEL_TYPE}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _HF_FIELDS:
            value = getattr(self, name)
            # Fields of ours, and those that most files do not have, only where they say something.
            if name in _ONLY_IF_SET and value == defaults[name]:
                continue
            data[name] = list(value) if isinstance(value, tuple) else value
        if spelling == "v5":
            data["num_local_experts"] = data.pop("num_experts")
        return {**data, **rope_spelling.spell(self.rope, spelling)}


_MODEL_TYPE = "qwen3_moe"
_HF_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(Qwen3MoeConfig)
    if field.name not in ("rope", "extra")
)
_ONLY_IF_SET = (
    "quantization_config",
    "router_z_loss_coef",
    "router_dtype",
    "moe_chunk_max_len",
    "moe_latent_size",
    "moe_shared_expert_intermediate_size",
    "enable_superkernel",
    "superkernel_scope",
)
# Files write null for these where the field is absent.
_NULL_MEANS_DEFAULT = ("head_dim", "mlp_only_layers", "quantization_config")


def read_config(path: str | os.PathLike) -> Qwen3MoeConfig:
    """Reads a config.json.

    Raises:
      FileNotFoundError: there is no such file.
      ConfigError: it is no JSON object, or from_hf refuses it; the message names the file.
    """
    path = local_path(path, "path")
    try:
        data = read_json(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        return Qwen3MoeConfig.from_hf(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
