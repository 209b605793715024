"""The model library: a Flax Qwen3-MoE on top of pallas_kernels. Not built yet."""
