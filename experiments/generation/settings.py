"""What was asked for on the command line, checked before anything is loaded."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from moe_jax.experts import EXPERTS_BACKENDS
from moe_jax.generation import Sampling
from moe_jax.json_files import local_path
from moe_jax.presets import PRESETS

DTYPES = ("bfloat16", "float32", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of generate, converted.

    Attributes:
      checkpoint: a directory, or None for a random model of `preset`.
      preset: a name in PRESETS, or None.
      prompts: texts; empty where prompt_tokens says how many random tokens to take instead.
      system: of a chat, or None.
      enable_thinking: what the chat template is given under this name; None gives it nothing.
      sampling: the flags that were given; the checkpoint says the rest.
      dtype: None keeps a checkpoint's.
    """

    checkpoint: pathlib.Path | None
    preset: str | None
    prompts: tuple[str, ...]
    prompt_tokens: int
    chat: bool
    system: str | None
    enable_thinking: bool | None
    batch: int
    max_new_tokens: int
    sampling: dict[str, float | int]
    seed: int
    stop: tuple[str, ...]
    ignore_eos: bool
    dtype: str | None
    prefill_chunk: int
    prefill_backend: str
    decode_backend: str
    capture_trace: pathlib.Path | None
    warm_up: bool

    def sampling_over(self, defaults: Sampling) -> Sampling:
        """The checkpoint's defaults with what was given in their place.

        Raises:
          ValueError: a flag has a value that it cannot have, or one that changes nothing.
        """
        try:
            sampling = dataclasses.replace(defaults, **self.sampling)
        except ValueError as error:
            raise ValueError(f"--{error}") from None
        for name in ("top_k", "top_p", "min_p"):
            if sampling.temperature == 0 and name in self.sampling:
                raise ValueError(
                    f"--{name} is {self.sampling[name]}, but choices are greedy; expected a "
                    "--temperature above 0 with it"
                )
        return sampling


def parse(
    *,
    checkpoint: str,
    preset: str,
    random: bool,
    prompt: Sequence[str],
    prompt_file: str,
    prompt_tokens: int,
    chat: bool,
    system: str,
    enable_thinking: bool | None,
    batch: int,
    max_new_tokens: int,
    sampling: dict[str, float | int | None],
    seed: int,
    stop: Sequence[str],
    ignore_eos: bool,
    dtype: str,
    prefill_chunk: int,
    experts_backend: str,
    decode_backend: str,
    capture_trace: str,
    warm_up: bool,
) -> Settings:
    """Checks the flags' values.

    Raises:
      ValueError: names the flag, its value and what is accepted.
    """
    _check_model(checkpoint, preset, random)
    least = {"prompt_tokens": (prompt_tokens, 0), "batch": (batch, 1), "seed": (seed, 0)}
    least |= {"max_new_tokens": (max_new_tokens, 1), "prefill_chunk": (prefill_chunk, 1)}
    for flag, (value, smallest) in least.items():
        if not smallest <= value < 2**31:
            raise ValueError(f"--{flag} is {value}; expected {smallest} to {2**31 - 1}")
    if dtype and dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    for flag, value in (("experts_backend", experts_backend), ("decode_backend", decode_backend)):
        if value not in ("", "auto", *EXPERTS_BACKENDS):
            accepted = ", ".join(("auto", *EXPERTS_BACKENDS))
            raise ValueError(f"--{flag} is {value!r}; expected one of {accepted}")
    if "" in stop:
        raise ValueError("--stop is empty; expected at least one character")
    if capture_trace and max_new_tokens < 2:
        raise ValueError(f"--max_new_tokens is {max_new_tokens}; expected 2 for --capture_trace")
    asked = Settings(
        checkpoint=local_path(checkpoint, "--checkpoint") if checkpoint else None,
        preset=preset or None,
        prompts=_prompts(prompt, prompt_file, prompt_tokens),
        prompt_tokens=prompt_tokens,
        chat=_check_chat(chat, system, enable_thinking, random, prompt_tokens),
        system=system or None,
        enable_thinking=enable_thinking,
        batch=batch,
        max_new_tokens=max_new_tokens,
        sampling={name: value for name, value in sampling.items() if value is not None},
        seed=seed,
        stop=tuple(stop),
        ignore_eos=ignore_eos,
        dtype=dtype or None,
        prefill_chunk=prefill_chunk,
        prefill_backend=experts_backend or "auto",
        decode_backend=decode_backend or experts_backend or "auto",
        capture_trace=_check_writable(capture_trace) if capture_trace else None,
        warm_up=warm_up,
    )
    if random:  # with a checkpoint its defaults decide what fits, once they are read
        asked.sampling_over(Sampling())
    return asked


def _check_model(checkpoint: str, preset: str, random: bool) -> None:
    if bool(checkpoint) == random:
        given = "both" if random else "neither"
        raise ValueError(f"--checkpoint and --random: {given} given; expected one of the two")
    if random and preset not in PRESETS:
        raise ValueError(f"--preset is {preset!r}; expected one of {', '.join(PRESETS)}")
    if checkpoint and preset:
        raise ValueError(f"--preset is {preset!r} with --checkpoint; expected it with --random")


def _prompts(prompt: Sequence[str], prompt_file: str, prompt_tokens: int) -> tuple[str, ...]:
    sources = [bool(prompt), bool(prompt_file), prompt_tokens > 0]
    if sum(sources) != 1:
        raise ValueError(
            f"--prompt, --prompt_file and --prompt_tokens: {sum(sources)} given; expected one of "
            "the three"
        )
    prompts = tuple(prompt)
    if prompt_file:
        try:
            prompts = (pathlib.Path(prompt_file).read_text(encoding="utf-8"),)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--prompt_file is {prompt_file!r}; expected a file of UTF-8: {error}"
            ) from None
    if "" in prompts:
        flag = "prompt_file" if prompt_file else "prompt"
        raise ValueError(f"--{flag} is empty; expected at least one character")
    return prompts


def _check_chat(
    chat: bool, system: str, enable_thinking: bool | None, random: bool, prompt_tokens: int
) -> bool:
    if chat and random:
        raise ValueError("--chat is given with --random; expected a checkpoint, with its template")
    if chat and prompt_tokens:
        raise ValueError("--chat is given with --prompt_tokens; expected a --prompt to say")
    if system and not chat:
        raise ValueError(f"--system is {system!r} without --chat; expected both")
    if enable_thinking is not None and not chat:
        raise ValueError(f"--enable_thinking is {enable_thinking} without --chat; expected both")
    return chat


def _check_writable(path: str) -> pathlib.Path:
    folder = pathlib.Path(path).parent
    if pathlib.Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--capture_trace is {path!r}; expected a file in a folder to write to")
    return pathlib.Path(path)
