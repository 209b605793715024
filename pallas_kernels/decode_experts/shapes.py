"""A layer's sizes, and those of published models' layers by the name of a preset.

The scripts compare and tune the layouts at these sizes, and the kernels' tests lower them for CUDA.
"""

import dataclasses
from typing import NamedTuple

from pallas_kernels.block_scaled_fp8 import BLOCK
from pallas_kernels.mosaic.operands import round_up

WEIGHT_FORMATS = ("bf16", "fp8")  # a plain array of bfloat16, and BlockScaledFp8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertShapes:
    """The sizes of one MoE layer: E experts, K of them for each token, H hidden, I intermediate.

    Attributes:
      weights: the format of its weights, of WEIGHT_FORMATS.
    """

    E: int
    K: int
    H: int
    I: int
    weights: str = "bf16"


class PublishedLayer(NamedTuple):
    """One row of the table.

    Attributes:
      shapes: the sizes of an expert layer; H and I are multiples of 64.
      models: the published models whose layers have these sizes.
      beyond: what else such a model needs; empty if `moe_jax` loads it.
    """

    shapes: ExpertShapes
    models: tuple[str, ...]
    beyond: str = ""


def _sizes(E: int, K: int, H: int, I: int) -> ExpertShapes:
    return ExpertShapes(E=E, K=K, H=H, I=I)


_DELTA_NETS = "gated delta nets"

PUBLISHED_LAYERS: dict[str, PublishedLayer] = {
    "qwen3_30b_a3b": PublishedLayer(
        _sizes(128, 8, 2048, 768),
        (
            "Qwen3-30B-A3B",
            "Qwen3-30B-A3B-Instruct-2507",
            "Qwen3-30B-A3B-Thinking-2507",
            "Qwen3-Coder-30B-A3B-Instruct",
            "the language model of Qwen3-VL-30B-A3B",
            "the language model of Qwen3-Omni-30B-A3B",
        ),
    ),
    "qwen3_235b_a22b": PublishedLayer(
        _sizes(128, 8, 4096, 1536),
        (
            "Qwen3-235B-A22B",
            "Qwen3-235B-A22B-Instruct-2507",
            "Qwen3-235B-A22B-Thinking-2507",
        ),
    ),
    "qwen3_coder_480b": PublishedLayer(
        _sizes(160, 8, 6144, 2560), ("Qwen3-Coder-480B-A35B-Instruct",)
    ),
    "qwen3_5_35b_a3b": PublishedLayer(
        _sizes(256, 8, 2048, 512), ("Qwen3.5-35B-A3B", "Qwen3.6-35B-A3B"), _DELTA_NETS
    ),
    "qwen3_next_80b_a3b": PublishedLayer(
        _sizes(512, 10, 2048, 512), ("Qwen3-Next-80B-A3B", "Qwen3-Coder-Next"), _DELTA_NETS
    ),
    "qwen3_5_122b_a10b": PublishedLayer(
        _sizes(256, 8, 3072, 1024), ("Qwen3.5-122B-A10B",), _DELTA_NETS
    ),
    "qwen3_5_397b_a17b": PublishedLayer(
        _sizes(512, 10, 4096, 1024), ("Qwen3.5-397B-A17B",), _DELTA_NETS
    ),
    "glm_4_5_air": PublishedLayer(_sizes(128, 8, 4096, 1408), ("GLM-4.5-Air",), "a sigmoid router"),
    "deepseek_v3": PublishedLayer(
        _sizes(256, 8, 7168, 2048),
        ("DeepSeek-V3", "DeepSeek-R1", "DeepSeek-V3.2"),
        "multi-head latent attention, a sigmoid router",
    ),
}

# What scripts and tests accept as a preset. No model has the sizes of "tiny": they are small enough
# for interpret mode on a CPU.
SHAPES: dict[str, ExpertShapes] = {
    "tiny": ExpertShapes(E=8, K=2, H=128, I=64),
    **{name: layer.shapes for name, layer in PUBLISHED_LAYERS.items()},
}


def shapes_of(preset: str, weights: str) -> ExpertShapes:
    """A preset's layer with weights of that format; "tiny" has whole scale blocks in FP8."""
    shapes = dataclasses.replace(SHAPES[preset], weights=weights)
    if weights == "bf16":
        return shapes
    whole = {name: round_up(getattr(shapes, name), BLOCK[0]) for name in ("H", "I")}
    return dataclasses.replace(shapes, **whole)
