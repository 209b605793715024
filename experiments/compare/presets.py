"""Which layer is compared: the expert sizes of published MoE models, and a tiny one for checks."""

from moe_jax.config import Qwen3MoeConfig
from moe_jax.presets import PRESETS as MODELS
from pallas_kernels.decode_experts import ExpertShapes


def expert_shapes(config: Qwen3MoeConfig) -> ExpertShapes:
    """The sizes of a model's expert layers."""
    return ExpertShapes(
        E=config.num_experts,
        K=config.num_experts_per_tok,
        H=config.hidden_size,
        I=config.moe_intermediate_size,
    )


PRESETS: dict[str, ExpertShapes] = {
    # Small enough for interpret mode on a CPU; no model has these sizes.
    "tiny": ExpertShapes(E=8, K=2, H=128, I=64),
    "qwen3_30b_a3b": expert_shapes(MODELS["qwen3_30b_a3b"]),
    "qwen3_235b_a22b": expert_shapes(MODELS["qwen3_235b_a22b"]),
    "qwen3_coder_480b": expert_shapes(MODELS["qwen3_coder_480b_a35b"]),
}
