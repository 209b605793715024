"""Loads, warms up, generates, reports."""

import time
from typing import Any, TextIO

from experiments.generation import load, output
from experiments.generation.settings import Settings
from moe_jax.generation import Generation, TraceRecorder, collect, stream
from moe_jax.traces import save_trace


def run(asked: Settings, out: TextIO) -> Generation:
    """Does what was asked for and writes text and figures to `out`.

    Raises:
      ValueError, OSError, NotImplementedError: it cannot be done; the message says what is wrong.
      FloatingPointError: a row's logits are NaN.
    """
    loaded = load.load(asked)
    prompts = load.prompt_ids(asked, loaded)
    recorder = TraceRecorder() if asked.capture_trace else None
    options = {
        "sampling": asked.sampling_over(loaded.defaults.sampling),
        "stop_ids": () if asked.ignore_eos else loaded.defaults.stop_ids,
        "seed": asked.seed,
        "prefill_chunk": asked.prefill_chunk,
        "capacity": _capacity(prompts, asked.max_new_tokens),
        "prefill_backend": asked.prefill_backend,
        "decode_backend": asked.decode_backend,
    }
    events = stream(
        loaded.model,
        prompts,
        max_new_tokens=asked.max_new_tokens,
        stop_strings=_stop_strings(asked, loaded),
        tokenizer=loaded.tokenizer,
        on_routing=recorder,
        **options,
    )
    seconds = _warm_up(asked, loaded, prompts, options) if asked.warm_up else None
    made = collect(output.shown(events, len(prompts), out), len(prompts))
    out.write(f"\n{output.report(made, prompts, seconds)}\n")
    if recorder is not None:
        save_trace(asked.capture_trace, recorder.trace())
        out.write(f"wrote {asked.capture_trace}\n")
    return made


def _stop_strings(asked: Settings, loaded: load.Loaded) -> tuple[str, ...]:
    """Those asked for, and the checkpoint's, which go with its end tokens."""
    if asked.ignore_eos or loaded.tokenizer is None:
        return asked.stop
    return (*asked.stop, *loaded.defaults.stop_strings)


def _warm_up(asked: Settings, loaded: load.Loaded, prompts, options: dict[str, Any]) -> float:
    """Compiles by a short run of the same shapes; returns the seconds that this took."""
    start = time.perf_counter()
    new = min(2, asked.max_new_tokens)
    hook = (lambda trace: None) if asked.capture_trace else None
    for _ in stream(loaded.model, prompts, max_new_tokens=new, on_routing=hook, **options):
        pass
    return time.perf_counter() - start


def _capacity(prompts: list[list[int]], max_new_tokens: int) -> int:
    """Of the cache: what the longest row needs, in steps of 64. The warm-up has the same."""
    return -(-(max(map(len, prompts)) + max_new_tokens) // 64) * 64
