"""The bytes that a decode step has to read, counted from the routing of the very steps timed.

Every weight once but the experts that no row was routed to and the embedding's other rows; the keys
and values of each row's context. Activations, logits and what is written are left out: they are
less than a hundredth. At batch 1 of Qwen3-30B-A3B in bf16 that is 6.08 GB:

    48 layers * (37.7 MB of attention + 0.5 MB of router + 8 experts of 9.4 MB) + 622 MB of head
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.config import Qwen3MoeConfig

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
_EXPERTS = ".mlp.experts."


class StepBytes(NamedTuple):
    """Bytes that a step reads, the mean over some steps.

    Attributes:
      weights: attention, norms, routers, dense and shared parts, and B rows of the embedding.
      experts: of the experts that at least one row was routed to.
      head: the output projection; the whole embedding, where the two are tied.
      cache: the keys and values of the context.
    """

    weights: float
    experts: float
    head: float
    cache: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def mean_unique_experts(expert_ids: np.ndarray) -> np.ndarray:
    """[layers] float64: distinct experts of a step in each MoE layer, the mean over steps.

    Args:
      expert_ids: [steps, layers, B, K] integers; negative where a row was routed nowhere.
    """
    steps, layers, B, K = expert_ids.shape
    ordered = np.sort(expert_ids.reshape(steps, layers, B * K), axis=-1)
    is_new = np.diff(ordered, axis=-1, prepend=-1) != 0  # negative ids come first, as the -1 does
    return np.sum(is_new & (ordered >= 0), axis=-1).mean(axis=0)


def step_bytes(
    config: Qwen3MoeConfig,
    parameters: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
    expert_ids: np.ndarray,
    *,
    context: int,
    cache_itemsize: int,
) -> StepBytes:
    """What the steps of a chain read.

    Args:
      config: the model's.
      parameters: by name, as moe_jax.parameters has them.
      expert_ids: [steps, MoE layers, B, K], the experts that each step chose.
      context: tokens in each row's cache before the first step.
      cache_itemsize: bytes of a number in the cache.
    """
    steps, _, B, _ = expert_ids.shape
    unique = mean_unique_experts(expert_ids)
    weights = head = experts = 0.0
    for name, array in parameters.items():
        size = array.size * np.dtype(array.dtype).itemsize
        if name == _EMBEDDING:
            weights += B * size / config.vocab_size
            head += size if _HEAD not in parameters else 0
        elif name == _HEAD:
            head += size
        elif _EXPERTS in name:
            layer = int(name.split(".")[1])
            experts += size / config.num_experts * unique[config.moe_layers.index(layer)]
        else:
            weights += size
    # Step i finds context + i tokens in each row; a query sees the window's last, itself included.
    seen = np.arange(context, context + steps)
    if config.window is not None:
        seen = np.minimum(seen, config.window - 1)
    a_token = 2 * config.num_key_value_heads * config.head_dim * cache_itemsize
    cache = float(seen.mean()) * a_token * B * config.num_hidden_layers
    return StepBytes(weights, experts, head, cache)
