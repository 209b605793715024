"""What a call of all layers asks of a backend: its sizes, and in words what only some of them have.

The words are what a NotImplementedError and `python -m experiments.backends` say.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax

from moe_jax.config import Qwen3MoeConfig
from moe_jax.decoder import Caches, LayerParams, MoeParams, StepOptions, TokenPositions
from moe_jax.dispatch import Request, backend_named
from moe_jax.parallelism import Parallelism
from moe_jax.traces import RoutingTrace
from pallas_kernels.block_scaled_fp8 import (
    BLOCK,
    BlockScaledFp8,
    holds_fp8,
    in_whole_blocks,
    is_fp8,
)
from pallas_kernels.decode_step.input_checks import HEAD_DIM, MAX_ROWS, SLOTS_MULTIPLE
from pallas_kernels.mosaic.device import HOPPER, capability_of, device_kind

SIZE_MULTIPLE = SLOTS_MULTIPLE  # of H and I, too

# What only the blocks take, in words, and whether it holds for (config, B, C, platform).
OF_MODEL: dict[str, Callable[[Qwen3MoeConfig, int, int, str], bool]] = {
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


class LayersCall(NamedTuple):
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
QUANTISED: dict[str, Callable[[LayersCall], bool]] = {
    "quantised weights": lambda call: holds_fp8(call.params),
}
# Likewise, what only the blocks take.
OF_CALL: dict[str, Callable[[LayersCall], bool]] = {
    f"FP8 weights in other blocks than whole ones of {BLOCK[0]} x {BLOCK[1]}": lambda call: (
        not call.has_whole_blocks
    ),
    "FP8 in some, not all, of q, k and v, or of gate_up and down": lambda call: call.mixes_formats,
    "a replay": lambda call: call.replay is not None,
    "a backend named for its experts or attention": lambda call: call.names_backends,
    "parameters or a cache of another dtype than its inputs": lambda call: call.mixes_dtypes,
}
# Likewise, on a mesh.
OF_MESH: dict[str, Callable[[Qwen3MoeConfig, Parallelism], bool]] = {
    "parameters split over a mesh's data": lambda _, mesh: mesh.splits_parameters,
    "more experts for a token than a shard has": lambda config, mesh: (
        config.num_experts_per_tok * mesh.size("expert") > config.num_experts
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersRequest(Request):
    """One run of all layers, for moe_jax.dispatch; T is B * S.

    On a mesh T and I are what one device has.

    Attributes:
      H, I: the model's size and an expert's.
      C: slots of a cache's row; 0 without a cache.
      needs: words in OF_MODEL, OF_MESH, QUANTISED and OF_CALL that hold.
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
        parallelism: Parallelism | None = None,
    ) -> "LayersRequest":
        """A model's; `needs` are the call's own, and T is of all devices of a mesh."""
        I, of_mesh = config.moe_intermediate_size, []
        if parallelism is not None:
            of_mesh = [word for word, has in OF_MESH.items() if has(config, parallelism)]
            I //= parallelism.size("tensor")
            T //= 1 if T % parallelism.size("data") else parallelism.size("data")
        of_model = [word for word, has in OF_MODEL.items() if has(config, T, C, platform)]
        return cls(
            platform=platform,
            phase=phase,
            T=T,
            dtype=dtype,
            activation=config.hidden_act,
            H=config.hidden_size,
            I=I,
            C=C,
            needs=(*of_model, *of_mesh, *needs),
        )

    @property
    def sizes(self) -> dict[str, int]:
        return {"H": self.H, "I": self.I, "C": self.C}

    @property
    def features(self) -> tuple[str, ...]:
        return self.needs
