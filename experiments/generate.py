"""Generates text with a checkpoint, or with a random model to see and to time that it runs.

    python -m experiments.generate --checkpoint=Qwen3-30B-A3B --chat --prompt="What is a router?"
    python -m experiments.generate --preset=tiny --random --prompt="hello" --max_new_tokens=8

A checkpoint is a Hugging Face directory, or an Orbax one as experiments.convert_checkpoint writes
it. The text is written while it is made, then the time to the first token and the tokens a second
of the decode steps. A random model takes bytes as tokens, and what it writes is hardly ever text.
With --mesh=expert=2, say, each device reads its own part of the weights.
"""

import dataclasses
import functools
import os
import pathlib
import sys
import time
from typing import Any, TextIO

import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from experiments.bench import mesh_flags, script
from experiments.bench.generated_text import logprobs_report, report, show_text
from experiments.bench.script import flag
from moe_jax.checkpoints import detect_format, load_hugging_face, load_orbax
from moe_jax.experts import EXPERTS_BACKENDS
from moe_jax.generation import (
    Generation,
    GenerationDefaults,
    Sampling,
    TraceRecorder,
    collect,
    read_generation_defaults,
    stream,
)
from moe_jax.json_files import local_path
from moe_jax.model import Qwen3Moe
from moe_jax.presets import PRESETS
from moe_jax.tokenization import ByteTokenizer, Tokenizer, load_tokenizer
from moe_jax.traces import save_trace

DTYPES = ("bfloat16", "float32", "float16")
_BACKENDS = ("auto", *EXPERTS_BACKENDS)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_BY_DEFAULT = "The checkpoint's generation_config.json by default."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    checkpoint: pathlib.Path | None = flag(None, "A checkpoint directory of either format.")
    preset: str | None = flag(None, "With --random: whose sizes.", of=PRESETS)
    random: bool = flag(False, "Random weights, and bytes as tokens.")
    prompt: tuple[str, ...] = flag((), "May be given several times: a row each.", repeated=True)
    prompt_file: pathlib.Path | None = flag(None, "A file that is the prompt.")
    prompt_tokens: int = flag(0, "In place of a prompt, this number of random tokens.", least=0)
    chat: bool = flag(False, "Whether prompts go through the chat template.")
    system: str | None = flag(None, "With --chat: the system message.")
    enable_thinking: bool | None = flag(
        None, "With --chat: the template's enable_thinking, its own by default."
    )
    batch: int = flag(1, "How many rows each prompt gets.", least=1)
    max_new_tokens: int = flag(128, "For every row.", least=1)
    temperature: float | None = flag(None, f"0 is greedy. {_BY_DEFAULT}")
    top_k: int | None = flag(None, f"0 is off. {_BY_DEFAULT}")
    top_p: float | None = flag(None, f"1 is off. {_BY_DEFAULT}")
    min_p: float | None = flag(None, f"0 is off. {_BY_DEFAULT}")
    repetition_penalty: float | None = flag(None, f"1 is off. {_BY_DEFAULT}")
    seed: int = flag(0, "Of the draws, of random weights and random prompts.", least=0)
    stop: tuple[str, ...] = flag(
        (), "Text that ends a row; may be given several times.", repeated=True
    )
    ignore_eos: bool = flag(False, "Whether to go on after an end token.")
    dtype: str | None = flag(
        None, "Of what is not FP8: by default as stored, bfloat16 for a random model.", of=DTYPES
    )
    dequantize: bool = flag(False, "Whether an FP8 checkpoint becomes bfloat16, or --dtype.")
    mesh: tuple[str, ...] = flag((), mesh_flags.MESH_HELP)
    prefill_chunk: int | None = flag(
        None, "Prompt tokens that run at once; the platform's own by default.", least=1
    )
    experts_backend: str = flag("auto", "What computes the experts.", of=_BACKENDS)
    decode_backend: str | None = flag(
        None, "The same for decode steps; --experts_backend by default.", of=_BACKENDS
    )
    steps_per_dispatch: int | None = flag(
        None, "The most decode steps started at once; the platform's own by default.", least=1
    )
    logprobs: int | None = flag(
        None, "Show each token's log-probability, and those of this number of tokens.", least=0
    )
    capture_trace: pathlib.Path | None = flag(
        None, "An .npz for the experts of every decode step; compare_layouts reads it."
    )
    warm_up: bool = flag(
        True, "Whether to compile in a short run before, so that the times leave it out."
    )

    def __post_init__(self):
        if (self.checkpoint is None) != self.random:
            given = "both" if self.random else "neither"
            raise ValueError(f"--checkpoint and --random: {given} given; expected one of the two")
        if self.random and self.preset is None:
            raise ValueError(f"--preset is empty; expected one of {', '.join(PRESETS)}")
        if self.checkpoint and self.preset:
            raise ValueError(
                f"--preset is {self.preset!r} with --checkpoint; expected it with --random"
            )
        if self.checkpoint:
            local_path(self.checkpoint, "--checkpoint")
        elif self.dequantize:
            raise ValueError("--dequantize is given with --random; expected it with --checkpoint")
        self.prompts()
        self._check_chat()
        if "" in self.stop:
            raise ValueError("--stop is empty; expected at least one character")
        if self.capture_trace is not None:
            self._check_trace(self.capture_trace)
        if self.random:  # with a checkpoint its defaults decide what fits, once they are read
            self.sampling_over(Sampling())

    def prompts(self) -> tuple[str, ...]:
        """The texts; empty where --prompt_tokens says how many random tokens to take instead.

        Raises:
          ValueError: there is none, or several flags give one, or the file cannot be read.
        """
        sources = [bool(self.prompt), self.prompt_file is not None, self.prompt_tokens > 0]
        if sum(sources) != 1:
            raise ValueError(
                f"--prompt, --prompt_file and --prompt_tokens: {sum(sources)} given; expected one "
                "of the three"
            )
        prompts, name = self.prompt, "prompt"
        if self.prompt_file is not None:
            name = "prompt_file"
            try:
                prompts = (self.prompt_file.read_text(encoding="utf-8"),)
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"--prompt_file is {str(self.prompt_file)!r}; expected a file of UTF-8: {error}"
                ) from None
        if "" in prompts:
            raise ValueError(f"--{name} is empty; expected at least one character")
        return prompts

    def _check_chat(self) -> None:
        if self.chat and self.random:
            raise ValueError(
                "--chat is given with --random; expected a checkpoint, with its template"
            )
        if self.chat and self.prompt_tokens:
            raise ValueError("--chat is given with --prompt_tokens; expected a --prompt to say")
        for name in ("system", "enable_thinking"):
            value = getattr(self, name)
            if value is not None and not self.chat:
                raise ValueError(f"--{name} is {value!r} without --chat; expected both")

    def _check_trace(self, path: pathlib.Path) -> None:
        if self.max_new_tokens < 2:
            raise ValueError(
                f"--max_new_tokens is {self.max_new_tokens}; expected 2 for --capture_trace"
            )
        if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(
                f"--capture_trace is {str(path)!r}; expected a file in a folder to write to"
            )

    def sampling_over(self, defaults: Sampling) -> Sampling:
        """The checkpoint's defaults with what was given in their place.

        Raises:
          ValueError: a flag has a value that it cannot have, or one that changes nothing.
        """
        given = {name: getattr(self, name) for name in _SAMPLING}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            sampling = dataclasses.replace(defaults, **given)
        except ValueError as error:
            raise ValueError(f"--{error}") from None
        for name in ("top_k", "top_p", "min_p"):
            if sampling.temperature == 0 and name in given:
                raise ValueError(
                    f"--{name} is {given[name]}, but choices are greedy; expected a "
                    "--temperature above 0 with it"
                )
        return sampling


def main(settings: Settings) -> None:
    """Generates to the standard output.

    Raises:
      ValueError, OSError, NotImplementedError, FloatingPointError: as generate_text.
    """
    logging.set_verbosity(logging.WARNING)  # absl's default shows a page of Orbax's notes
    if "pallas_interpret" in (settings.experts_backend, settings.decode_backend):
        script.make_interpreter_safe()
    generate_text(settings, sys.stdout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """What is needed to generate; tokenizer is None for a checkpoint that has none."""

    model: Qwen3Moe
    tokenizer: Tokenizer | ByteTokenizer | None
    defaults: GenerationDefaults


def load_to_generate(settings: Settings) -> LoadedModel:
    """Loads the checkpoint, or makes random weights on the device.

    Raises:
      ValueError, OSError, NotImplementedError: the checkpoint cannot be loaded; names the file.
    """
    # Decoding would gather parameters that data splits at each step.
    parallelism = mesh_flags.parallelism_of(settings.mesh, fsdp=False)
    if settings.checkpoint is None:
        config = PRESETS[settings.preset]
        dtype = jnp.dtype(settings.dtype or "bfloat16")
        place = None if parallelism is None else parallelism.place
        return LoadedModel(
            model=Qwen3Moe(config, rngs=nnx.Rngs(settings.seed), dtype=dtype, place=place),
            tokenizer=ByteTokenizer(config.vocab_size),
            defaults=GenerationDefaults(),
        )
    # The small files first, because a mistake in them should not take minutes to come out.
    formats = {"hugging_face": load_hugging_face, "orbax": load_orbax}
    load_weights = formats[detect_format(settings.checkpoint)]
    try:
        tokenizer = load_tokenizer(settings.checkpoint)
    except FileNotFoundError:
        if not settings.prompt_tokens:  # random tokens can do without
            raise
        tokenizer = None
    defaults = read_generation_defaults(settings.checkpoint)
    settings.sampling_over(defaults.sampling)
    model = load_weights(
        settings.checkpoint,
        dtype=settings.dtype,
        dequantize=settings.dequantize,
        shardings=None if parallelism is None else parallelism.rule(),
    )
    if not defaults.stop_ids:  # Orbax keeps the config where read_generation_defaults does not look
        defaults = read_generation_defaults(settings.checkpoint, model.config.extra)
    return LoadedModel(model=model, tokenizer=tokenizer, defaults=defaults)


def prompt_ids(settings: Settings, loaded: LoadedModel) -> list[list[int]]:
    """The rows to generate for: each prompt, `batch` times.

    Raises:
      ValueError: a prompt has no tokens, or the chat template fails.
    """
    if settings.prompt_tokens:
        random = np.random.default_rng(settings.seed)
        V = loaded.model.config.vocab_size
        return [
            random.integers(0, V, settings.prompt_tokens).tolist() for _ in range(settings.batch)
        ]
    rows = []
    system = [{"role": "system", "content": settings.system}] if settings.system else []
    thinking = {"enable_thinking": settings.enable_thinking}
    variables = {} if settings.enable_thinking is None else thinking
    for text in settings.prompts():
        if settings.chat:
            messages = [*system, {"role": "user", "content": text}]
            ids = loaded.tokenizer.encode_chat(messages, **variables)
        else:
            ids = loaded.tokenizer.encode(text)
        rows += [ids] * settings.batch
    return rows


def generate_text(settings: Settings, out: TextIO) -> Generation:
    """Does what was asked for and writes text and figures to `out`.

    Raises:
      ValueError, OSError, NotImplementedError: it cannot be done; the message says what is wrong.
      FloatingPointError: a row's logits are NaN.
    """
    loaded = load_to_generate(settings)
    prompts = prompt_ids(settings, loaded)
    recorder = TraceRecorder() if settings.capture_trace else None
    options = {
        "sampling": settings.sampling_over(loaded.defaults.sampling),
        "stop_ids": () if settings.ignore_eos else loaded.defaults.stop_ids,
        "seed": settings.seed,
        "prefill_chunk": settings.prefill_chunk,
        "capacity": _capacity(prompts, settings.max_new_tokens),
        "prefill_backend": settings.experts_backend,
        "decode_backend": settings.decode_backend or settings.experts_backend,
        "steps_per_dispatch": settings.steps_per_dispatch,
        "logprobs": settings.logprobs,
    }
    events = stream(
        loaded.model,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        stop_strings=_stop_strings(settings, loaded),
        tokenizer=loaded.tokenizer,
        on_routing=recorder,
        **options,
    )
    seconds = _warm_up(settings, loaded, prompts, options) if settings.warm_up else None
    made = collect(show_text(events, len(prompts), out), len(prompts))
    out.write(logprobs_report(made, loaded.tokenizer))
    out.write(f"\n{report(made, prompts, seconds)}\n")
    if recorder is not None:
        save_trace(settings.capture_trace, recorder.trace())
        out.write(f"wrote {settings.capture_trace}\n")
    return made


def _stop_strings(settings: Settings, loaded: LoadedModel) -> tuple[str, ...]:
    """Those asked for, and the checkpoint's, which go with its end tokens."""
    if settings.ignore_eos or loaded.tokenizer is None:
        return settings.stop
    return (*settings.stop, *loaded.defaults.stop_strings)


def _warm_up(settings: Settings, loaded: LoadedModel, prompts, options: dict[str, Any]) -> float:
    """Compiles by a short run of the same shapes; returns the seconds that this took."""
    start = time.perf_counter()
    new = min(2, settings.max_new_tokens)
    hook = (lambda trace: None) if settings.capture_trace else None
    for _ in stream(loaded.model, prompts, max_new_tokens=new, on_routing=hook, **options):
        pass
    return time.perf_counter() - start


def _capacity(prompts: list[list[int]], max_new_tokens: int) -> int:
    """Of the cache: what the longest row needs, in steps of 64. The warm-up has the same."""
    return -(-(max(map(len, prompts)) + max_new_tokens) // 64) * 64


run = functools.partial(
    script.run,
    Settings,
    main,
    one_line=(ValueError, OSError, NotImplementedError, FloatingPointError),
)

if __name__ == "__main__":
    run()
