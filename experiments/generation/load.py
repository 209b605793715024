"""The model, its tokenizer and its defaults, from a checkpoint or made at random."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.generation.settings import Settings
from moe_jax.checkpoints import detect_format, load_hugging_face, load_orbax
from moe_jax.generation import GenerationDefaults, read_generation_defaults
from moe_jax.model import Qwen3Moe
from moe_jax.presets import PRESETS
from moe_jax.tokenization import ByteTokenizer, Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """What is needed to generate; tokenizer is None for a checkpoint that has none."""

    model: Qwen3Moe
    tokenizer: Tokenizer | ByteTokenizer | None
    defaults: GenerationDefaults


def load(asked: Settings) -> Loaded:
    """Loads the checkpoint, or makes random weights on the device.

    Raises:
      ValueError, OSError, NotImplementedError: the checkpoint cannot be loaded; names the file.
    """
    if asked.checkpoint is None:
        config = PRESETS[asked.preset]
        dtype = jnp.dtype(asked.dtype or "bfloat16")
        return Loaded(
            model=Qwen3Moe(config, rngs=nnx.Rngs(asked.seed), dtype=dtype),
            tokenizer=ByteTokenizer(config.vocab_size),
            defaults=GenerationDefaults(),
        )
    # The small files first, for a mistake in them should not take minutes to come out.
    formats = {"hugging_face": load_hugging_face, "orbax": load_orbax}
    load_weights = formats[detect_format(asked.checkpoint)]
    try:
        tokenizer = load_tokenizer(asked.checkpoint)
    except FileNotFoundError:
        if asked.prompts:  # random tokens can do without
            raise
        tokenizer = None
    defaults = read_generation_defaults(asked.checkpoint)
    asked.sampling_over(defaults.sampling)
    model = load_weights(asked.checkpoint, dtype=asked.dtype)
    if not defaults.stop_ids:  # Orbax keeps the config where read_generation_defaults does not look
        defaults = read_generation_defaults(asked.checkpoint, model.config.extra)
    return Loaded(model=model, tokenizer=tokenizer, defaults=defaults)


def prompt_ids(asked: Settings, loaded: Loaded) -> list[list[int]]:
    """The rows to generate for: each prompt, `batch` times.

    Raises:
      ValueError: a prompt has no tokens, or the chat template fails.
    """
    if asked.prompt_tokens:
        random = np.random.default_rng(asked.seed)
        V = loaded.model.config.vocab_size
        return [random.integers(0, V, asked.prompt_tokens).tolist() for _ in range(asked.batch)]
    rows = []
    system = [{"role": "system", "content": asked.system}] if asked.system else []
    thinking = {"enable_thinking": asked.enable_thinking}
    variables = {} if asked.enable_thinking is None else thinking
    for text in asked.prompts:
        if asked.chat:
            messages = [*system, {"role": "user", "content": text}]
            ids = loaded.tokenizer.encode_chat(messages, **variables)
        else:
            ids = loaded.tokenizer.encode(text)
        rows += [ids] * asked.batch
    return rows
