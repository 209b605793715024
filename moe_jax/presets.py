"""The five published models' configs, as on the hub, and a tiny one for tests and notebooks."""

from moe_jax.config import Qwen3MoeConfig
from moe_jax.rope import RopeConfig

_PUBLISHED = {
    "head_dim": 128,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "num_experts_per_tok": 8,
    "sliding_window": None,
}

_30B = _PUBLISHED | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "moe_intermediate_size": 768,
}

PRESETS: dict[str, Qwen3MoeConfig] = {
    # H and I are multiples of 64, so that the kernels' interpret mode runs it too.
    "tiny": Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
    ),
    "qwen3_30b_a3b": Qwen3MoeConfig(
        **_30B, max_position_embeddings=40960, rope=RopeConfig(theta=1e6)
    ),
    "qwen3_30b_a3b_instruct_2507": Qwen3MoeConfig(
        **_30B, max_position_embeddings=262144, rope=RopeConfig(theta=1e7)
    ),
    "qwen3_coder_30b_a3b": Qwen3MoeConfig(
        **_30B | {"intermediate_size": 5472},
        max_position_embeddings=262144,
        rope=RopeConfig(theta=1e7),
        router_aux_loss_coef=0.0,
    ),
    "qwen3_235b_a22b": Qwen3MoeConfig(
        **_PUBLISHED,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=94,
        num_attention_heads=64,
        num_key_value_heads=4,
        num_experts=128,
        moe_intermediate_size=1536,
        max_position_embeddings=40960,
        rope=RopeConfig(theta=1e6),
    ),
    "qwen3_coder_480b_a35b": Qwen3MoeConfig(
        **_PUBLISHED,
        hidden_size=6144,
        intermediate_size=8192,
        num_hidden_layers=62,
        num_attention_heads=96,
        num_key_value_heads=8,
        num_experts=160,
        moe_intermediate_size=2560,
        max_position_embeddings=262144,
        rope=RopeConfig(theta=1e7),
        router_aux_loss_coef=0.0,
    ),
}
