"""Generates text with a checkpoint, or with a random model to see and to time that it runs.

    python -m experiments.generate --checkpoint=Qwen3-30B-A3B --chat --prompt="What is a router?"
    python -m experiments.generate --preset=tiny --random --prompt="hello" --max_new_tokens=8

A checkpoint is a Hugging Face directory, or an Orbax one as experiments.convert_checkpoint writes
it. The text is written while it is made, then the time to the first token and the tokens a second
of the decode steps. A random model takes bytes as tokens, and what it writes is hardly ever text.
"""

import os
import sys

from absl import app, flags, logging

# JAX takes three quarters of a GPU's memory by default; a 30B model in bfloat16 needs more of
# 80 GB. This is read when the first device is asked for.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax

from experiments.generation import settings
from experiments.generation.run import run
from moe_jax.experts import EXPERTS_BACKENDS
from moe_jax.presets import PRESETS

_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "A checkpoint directory of either format.")
_PRESET = flags.DEFINE_string("preset", "", f"With --random: {', '.join(PRESETS)}.")
_RANDOM = flags.DEFINE_bool("random", False, "Random weights, and bytes as tokens.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "May be given several times: a row each.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", "", "A file that is the prompt.")
_PROMPT_TOKENS = flags.DEFINE_integer(
    "prompt_tokens", 0, "In place of a prompt, this number of random tokens."
)
_CHAT = flags.DEFINE_bool("chat", False, "Whether prompts go through the chat template.")
_SYSTEM = flags.DEFINE_string("system", "", "With --chat: the system message.")
_ENABLE_THINKING = flags.DEFINE_bool(
    "enable_thinking", None, "With --chat: the template's enable_thinking, its own by default."
)
_BATCH = flags.DEFINE_integer("batch", 1, "How many rows each prompt gets.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "For every row.")
_FROM_CHECKPOINT = "The checkpoint's generation_config.json by default."
_TEMPERATURE = flags.DEFINE_float("temperature", None, f"0 is greedy. {_FROM_CHECKPOINT}")
_TOP_K = flags.DEFINE_integer("top_k", None, f"0 is off. {_FROM_CHECKPOINT}")
_TOP_P = flags.DEFINE_float("top_p", None, f"1 is off. {_FROM_CHECKPOINT}")
_MIN_P = flags.DEFINE_float("min_p", None, f"0 is off. {_FROM_CHECKPOINT}")
_REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", None, f"1 is off. {_FROM_CHECKPOINT}"
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws, of random weights and random prompts.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text that ends a row; may be given several times.")
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Whether to go on after an end token.")
_DTYPE = flags.DEFINE_string(
    "dtype", "", f"{', '.join(settings.DTYPES)}; empty: as stored, bfloat16 for a random model."
)
_PREFILL_CHUNK = flags.DEFINE_integer("prefill_chunk", 512, "Prompt tokens that run at once.")
_EXPERTS_BACKEND = flags.DEFINE_string(
    "experts_backend", "auto", f"auto, {', '.join(EXPERTS_BACKENDS)}."
)
_DECODE_BACKEND = flags.DEFINE_string(
    "decode_backend", "", "The same for decode steps; --experts_backend if empty."
)
_CAPTURE_TRACE = flags.DEFINE_string(
    "capture_trace", "", "An .npz for the experts of every decode step; compare_layouts reads it."
)
_WARM_UP = flags.DEFINE_bool(
    "warm_up", True, "Whether to compile in a short run before, so that the times leave it out."
)


def main(argv: list[str]) -> None:
    """Checks the flags and generates; exits 1 with one line if anything fails."""
    if len(argv) > 1:
        sys.exit(f"generate takes flags only; left over: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # absl's default shows a page of Orbax's notes
    try:
        asked = _settings()
        if "pallas_interpret" in (asked.prefill_backend, asked.decode_backend):
            # Or Pallas's interpreter can hang; read when the CPU client is made.
            jax.config.update("jax_cpu_enable_async_dispatch", False)
        run(asked, sys.stdout)
    except (ValueError, OSError, NotImplementedError, FloatingPointError) as error:
        sys.exit(f"generate: {error}")


def _settings() -> settings.Settings:
    return settings.parse(
        checkpoint=_CHECKPOINT.value,
        preset=_PRESET.value,
        random=_RANDOM.value,
        prompt=_PROMPT.value,
        prompt_file=_PROMPT_FILE.value,
        prompt_tokens=_PROMPT_TOKENS.value,
        chat=_CHAT.value,
        system=_SYSTEM.value,
        enable_thinking=_ENABLE_THINKING.value,
        batch=_BATCH.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        sampling={
            "temperature": _TEMPERATURE.value,
            "top_k": _TOP_K.value,
            "top_p": _TOP_P.value,
            "min_p": _MIN_P.value,
            "repetition_penalty": _REPETITION_PENALTY.value,
        },
        seed=_SEED.value,
        stop=_STOP.value,
        ignore_eos=_IGNORE_EOS.value,
        dtype=_DTYPE.value,
        prefill_chunk=_PREFILL_CHUNK.value,
        experts_backend=_EXPERTS_BACKEND.value,
        decode_backend=_DECODE_BACKEND.value,
        capture_trace=_CAPTURE_TRACE.value,
        warm_up=_WARM_UP.value,
    )


if __name__ == "__main__":
    app.run(main)
