"""What a run begins with: a model, its tokenizer, the tokens of its texts, and what names them."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import generate as generate_script
from experiments.bench import corpus
from moe_jax.config import Qwen3MoeConfig
from moe_jax.generation.arguments import position_limit
from moe_jax.model import Qwen3Moe
from moe_jax.parallelism import Parallelism
from moe_jax.parameters import from_arrays, to_arrays
from moe_jax.tokenization import Tokenizer

HEAD_DIM = 32  # of a small model's attention
AUX_LOSS_COEF = 0.01
# Of a new model, where no flag says otherwise.
SIZES = {
    "vocab_size": 2048,
    "layers": 2,
    "hidden": 128,
    "experts": 8,
    "experts_per_token": 2,
    "moe_intermediate": 64,
}


class Start(NamedTuple):
    """The float32 model to begin with, its tokenizer, and the folder of the tokenizer's files."""

    model: Qwen3Moe
    tokenizer: Tokenizer
    sidecars: pathlib.Path


def from_checkpoint(
    source: pathlib.Path, *, context: int, coefficients: Mapping[str, float | None]
) -> Start:
    """A checkpoint of either format.

    Args:
      source: its folder.
      context: tokens of a row.
      coefficients: of the router losses, by their names in the config; None keeps its own.

    Raises:
      ValueError: it cannot be loaded, or does not take as many positions.
    """
    loaded = generate_script.load_to_generate(
        generate_script.Settings(checkpoint=source, dtype="float32", dequantize=True, prompt=("-",))
    )
    config = _with_coefficients(loaded.model.config, coefficients)
    limit = position_limit(config)
    if limit is not None and context > limit:
        raise ValueError(
            f"--context is {context}; expected at most {limit}, the checkpoint's "
            "max_position_embeddings"
        )
    return Start(from_arrays(config, to_arrays(loaded.model)), loaded.tokenizer, source)


def new_model(
    folder: pathlib.Path,
    texts: Sequence[str],
    *,
    vocab_size: int,
    context: int,
    coefficients: Mapping[str, float | None],
    seed: int,
    parallelism: Parallelism | None = None,
    **sizes: int,
) -> Start:
    """A small model with drawn weights, and a tokenizer made of the texts.

    Args:
      folder: where the tokenizer is kept.
      texts: to train on.
      vocab_size: at most as many tokens.
      context, coefficients: as in from_checkpoint.
      seed: of the weights.
      parallelism: the mesh that they are drawn onto, a layer at a time; None for one device.
      sizes: the others of small_config.

    Raises:
      ValueError: vocab_size is below 257, or the mesh does not divide a size.
    """
    tokenizer = corpus.trained_tokenizer(folder, texts, vocab_size)
    config = small_config(
        vocab_size=vocab_size, context=context, eos_token_id=tokenizer.eos_id, **sizes
    )
    config = _with_coefficients(config, coefficients)
    place = None
    if parallelism is not None:
        parallelism.check(config)
        place = parallelism.place
    model = Qwen3Moe(config, rngs=nnx.Rngs(seed), dtype=jnp.float32, place=place)
    return Start(model, tokenizer, folder)


def _with_coefficients(
    config: Qwen3MoeConfig, coefficients: Mapping[str, float | None]
) -> Qwen3MoeConfig:
    given = {name: value for name, value in coefficients.items() if value is not None}
    return dataclasses.replace(config, **given)


def small_config(
    *,
    vocab_size: int,
    layers: int,
    hidden: int,
    experts: int,
    experts_per_token: int,
    moe_intermediate: int,
    context: int,
    eos_token_id: int,
) -> Qwen3MoeConfig:
    """A config of these sizes: heads of HEAD_DIM, two for a key, and a tied embedding."""
    heads = hidden // HEAD_DIM
    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=context,
        num_experts=experts,
        num_experts_per_tok=experts_per_token,
        moe_intermediate_size=moe_intermediate,
        norm_topk_prob=True,
        router_aux_loss_coef=AUX_LOSS_COEF,
        tie_word_embeddings=True,
        extra={"eos_token_id": eos_token_id},
    )


def token_ids(tokenizer: Tokenizer, texts: Sequence[str], vocab_size: int) -> list[list[int]]:
    """Each document's tokens, and the end token behind them where the tokenizer has one.

    Raises:
      ValueError: there is a token that the model has not.
    """
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    made = [[*tokenizer.encode(text, add_special_tokens=False), *end] for text in texts]
    largest = max(max(ids, default=0) for ids in made)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer gives token {largest}; expected 0 to {vocab_size - 1}, as vocab_size "
            f"is {vocab_size}"
        )
    return made


def checksum(documents: Sequence[Sequence[int]]) -> str:
    """Of the tokens of documents: it changes with the texts, and with the tokenizer."""
    sha = hashlib.sha256()
    for ids in documents:
        sha.update(np.asarray([len(ids), *ids], "<i8").tobytes())
    return sha.hexdigest()
