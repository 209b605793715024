"""Which layer is compared: the expert sizes of published MoE models, and a tiny one for checks."""

from pallas_kernels.decode_experts import ExpertShapes

PRESETS: dict[str, ExpertShapes] = {
    # Small enough for interpret mode on a CPU; no model has these sizes.
    "tiny": ExpertShapes(E=8, K=2, H=128, I=64),
    "qwen3_30b_a3b": ExpertShapes(E=128, K=8, H=2048, I=768),
    "qwen3_235b_a22b": ExpertShapes(E=128, K=8, H=4096, I=1536),
    "qwen3_coder_480b": ExpertShapes(E=160, K=8, H=6144, I=2560),
}
