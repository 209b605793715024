"""The baseline of decode_speed and prefill_speed: transformers' Qwen3-MoE in its own process.

    python -m experiments.bench.transformers_child '{"config": {...}, "pairs": [[1, 512]], ...}'

prints one JSON line for each batch and context. Random bf16 weights on the GPU, the experts by
grouped_mm. A decode step has a static cache, and is compiled with mode="reduce-overhead" (CUDA
graphs) and fullgraph=True. As in decode_chain.py a context is a cache of random keys and values,
and each row and step is given a random token. A prefill of `context` random tokens is not compiled,
as users run it. `measure_in_child` starts the process, so that the memory is free again afterwards;
torch is imported there only, and this file needs no JAX.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
_WARM_UPS = 4  # compiles, warms CUDA's pools up, records the graph, runs it
_LAST_LINES = 15


class BaselineError(Exception):
    """The baseline's process could not run; the message says why."""


def measure_in_child(
    config: Mapping[str, Any],
    pairs: Sequence[tuple[int, int]],
    *,
    steps: int,
    repeats: int,
    seed: int,
    phase: str = "decode",
    device: str = "cuda",
) -> Iterator[dict[str, Any]]:
    """Times each (batch, context).

    Args:
      config: the model's, as Qwen3MoeConfig.to_hf gives it.
      pairs: batches and contexts.
      steps: timed back to back in a sample.
      repeats: samples, of which the median counts.
      seed: of the weights, the cache and the tokens.
      phase: "decode" for a step behind each context, "prefill" for the context itself.
      device: torch's name of it.

    Yields:
      A dictionary for each pair, as soon as it is timed: batch, context, ms, ms_spread, compile_s,
      peak_bytes and versions; error in place of the figures where one failed.

    Raises:
      BaselineError: torch or transformers is missing, there is no such device, the model cannot be
        made, or the process died.
    """
    job = {
        "config": dict(config),
        "pairs": [list(pair) for pair in pairs],
        "steps": steps,
        "repeats": repeats,
        "seed": seed,
        "phase": phase,
        "device": device,
    }
    command = [sys.executable, "-m", __spec__.name, json.dumps(job)]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, cwd=_REPOSITORY, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            for line in child.stdout:
                if line.startswith("{"):
                    row = json.loads(line)
                    if "fatal" in row:
                        raise BaselineError(row["fatal"])
                    yield row
            if child.wait():
                errors.seek(0)
                said = "".join(errors.readlines()[-_LAST_LINES:])
                raise BaselineError(f"its process ended with status {child.returncode}:\n{said}")
        finally:
            child.kill()
            child.wait()


def main(job: Mapping[str, Any]) -> None:
    """Measures and prints; the part that runs in the child."""
    try:
        import torch
        import transformers
    except ImportError as error:
        _say(fatal=f"torch and transformers are needed: {error}")
        return
    device = torch.device(job["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        _say(fatal="torch sees no CUDA device")
        return
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    torch.manual_seed(job["seed"])
    try:
        model = _make_model(job["config"], device)
    except Exception as error:
        _say(fatal=f"the model cannot be made: {_short(error)}")
        return
    for B, context in job["pairs"]:
        try:
            found = _MEASURES[job["phase"]](model, B, context, job, device)
        except Exception as error:  # out of memory, say; the next one may fit
            found = {"error": _short(error)}
        _say(batch=B, context=context, versions=versions, **found)
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _make_model(config: Mapping[str, Any], device):
    """Random bf16 weights, drawn on the device."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    with device:
        model = AutoModelForCausalLM.from_config(
            Qwen3MoeConfig(**config),
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
        )
    return model.eval()


def _measure_decode(model, B: int, context: int, job: Mapping[str, Any], device) -> dict[str, Any]:
    """Times one batch and context."""
    import torch
    from transformers import StaticCache

    config, steps = model.config, job["steps"]
    capacity = -(-(context + steps) // 64) * 64
    cache = StaticCache(config=config, max_cache_len=capacity)
    cache.early_initialization(
        B, config.num_key_value_heads, config.head_dim, torch.bfloat16, device
    )
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    tokens = torch.randint(config.vocab_size, (steps, B, 1), device=device)

    def step(ids):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(dim=-1)

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def run(count: int) -> float:
        """Seconds of some steps from the context on, issued back to back."""
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)
        _wait(device)
        begun = time.perf_counter()
        for index in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            compiled(tokens[index])
        _wait(device)
        return time.perf_counter() - begun

    with torch.no_grad():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        for _ in range(_WARM_UPS):
            run(1)
        compile_s = time.perf_counter() - begun
        run(steps)
        samples = sorted(run(steps) / steps * 1e3 for _ in range(job["repeats"]))
    return _figures(samples, compile_s, device)


def _measure_prefill(model, B: int, context: int, job: Mapping[str, Any], device) -> dict[str, Any]:
    """Times the first token of prompts of `context` tokens, cache included."""
    import torch

    ids = torch.randint(model.config.vocab_size, (B, context), device=device)

    def run() -> float:
        _wait(device)
        begun = time.perf_counter()
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        output.logits[:, -1].argmax(dim=-1)
        _wait(device)
        return time.perf_counter() - begun

    with torch.no_grad():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first_s = max(run() for _ in range(2))
        samples = sorted(run() * 1e3 for _ in range(job["repeats"]))
    return _figures(samples, first_s, device)


_MEASURES = {"decode": _measure_decode, "prefill": _measure_prefill}


def _wait(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def _figures(samples: Sequence[float], compile_s: float, device) -> dict[str, Any]:
    """Of sorted samples in ms; compile_s is the time before them."""
    import torch

    quarter = len(samples) // 4
    return {
        "ms": statistics.median(samples),
        "ms_spread": samples[-1 - quarter] - samples[quarter],
        "compile_s": compile_s,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def _say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:400]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
