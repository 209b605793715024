"""Attention of queries to keys: one function, several implementations; start at `api.py`."""

from moe_jax.attention.api import ATTENTION_BACKENDS, AttentionRequest, attention

__all__ = ["ATTENTION_BACKENDS", "AttentionRequest", "attention"]
