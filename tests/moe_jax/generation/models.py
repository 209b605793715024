"""Tiny float32 models, their plain greedy continuation, and prompts.

Compiling is most of these tests' time. So nearly all of them run a model of one layer on three
prompts of one bucket, greedy or with the Steps of DRAWN: each of the four functions compiles once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.generation import Sampling
from moe_jax.model import Qwen3Moe
from moe_jax.presets import PRESETS

# All logits processors. Other numbers in it compile nothing, but for the n-grams' size.
DRAWN = Sampling(
    temperature=1.0,
    top_k=40,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.1,
    no_repeat_ngram_size=2,
    bad_words_ids=[[1, 2]],
    suppress_tokens=[3],
)
V = 128  # every token is an ASCII byte, so every token is text
LONGEST = 64

# Padded to 16 columns: with up to 48 new tokens all have one shape, and are compiled once.
PROMPTS = [
    list(b"hello"),
    list(b"a longer prompt"),
    list(b"x"),
]


@functools.cache
def tiny(**changes) -> Qwen3Moe:
    """The tiny preset with one layer, a vocabulary of ASCII, and weights large enough to differ."""
    fields = {"vocab_size": V, "initializer_range": 0.1, "num_hidden_layers": 1, **changes}
    config = dataclasses.replace(PRESETS["tiny"], **fields)
    return Qwen3Moe(config, rngs=nnx.Rngs(0), dtype=jnp.float32)


def spoilt(value: float, token: int, **changes) -> Qwen3Moe:
    """The tiny model with `value` all through one token's embedding."""
    model = nnx.clone(tiny(**changes))
    table = model.embed_tokens.weight
    table[...] = table[...].at[token].set(value)
    return model


@functools.cache
def _whole_model(**changes):
    graph, state = nnx.split(tiny(**changes))

    @jax.jit
    def run(ids, length):
        model = nnx.merge(graph, state)
        valid = jnp.arange(LONGEST)[None] < length
        kept = jnp.asarray(length - 1)[None]
        out = model(ids, attention_mask=valid, logits_to_keep=kept, output_routings=True)
        return out.logits[0, 0], out.routings

    return run


def plain_greedy(prompt: list[int], new: int, banned=lambda row: [], **changes) -> list[int]:
    """The argmax loop through the whole model, without a cache.

    `banned` says which tokens may not follow a row.
    """
    ids = np.zeros((1, LONGEST), np.int32)
    ids[0, : len(prompt)] = prompt
    for length in range(len(prompt), len(prompt) + new):
        logits = np.array(_whole_model(**changes)(ids, length)[0])
        logits[banned(ids[0, :length].tolist())] = -np.inf
        ids[0, length] = logits.argmax()
    return ids[0, len(prompt) : len(prompt) + new].tolist()


def plain_logits(tokens: list[int], **changes) -> np.ndarray:
    """[V] float32: what the whole model, without a cache, says of the token after these."""
    ids = np.zeros((1, LONGEST), np.int32)
    ids[0, : len(tokens)] = tokens
    return np.asarray(_whole_model(**changes)(ids, len(tokens))[0])


def plain_routings(tokens: list[int]) -> tuple:
    """Each MoE layer's Routing of these tokens, LONGEST rows of which the first are theirs."""
    ids = np.zeros((1, LONGEST), np.int32)
    ids[0, : len(tokens)] = tokens
    return _whole_model()(ids, len(tokens))[1]
