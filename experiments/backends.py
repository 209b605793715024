"""Which backend computes the experts, where and why? Prints the dispatch; --run and --time try it.

    python -m experiments.backends
    python -m experiments.backends --platforms=ascend,cuda --tokens=1,64,65 --latent_size=1024
    python -m experiments.backends --run=portable,pallas --layers=4
    python -m experiments.backends --time=portable,grouped,pallas --tokens=64,512,4096

With --run a random model of the preset generates greedily with both backends from the same weights;
printed are what ran and whether the tokens agree, with float32 as the judge of those that do not.
It exits 1 if they differ by more than bfloat16's rounding. With --time each backend computes one
layer's experts for that many tokens.
"""

import dataclasses
import os
import sys

from absl import app, flags, logging

# As in experiments.generate: read when the first device is asked for.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from experiments.bench.environment import checked_out_commit
from experiments.dispatch import agreement, tables, timing
from experiments.generate import DTYPES
from moe_jax.activations import ACTIVATIONS
from moe_jax.experts import EXPERTS_BACKENDS, ExpertsRequest
from moe_jax.model import Qwen3Moe
from moe_jax.platforms import resolve_platform
from moe_jax.presets import PRESETS

_PRESET = flags.DEFINE_string("preset", "qwen3_30b_a3b", f"Whose sizes: {', '.join(PRESETS)}.")
_PLATFORMS = flags.DEFINE_list("platforms", [], "For whom to choose; empty: this one and ascend.")
_TOKENS = flags.DEFINE_list("tokens", ["1", "64", "512"], "Tokens of a step.")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", f"Of the model: {', '.join(DTYPES)}.")
_ACTIVATION = flags.DEFINE_string("activation", "", f"{', '.join(ACTIVATIONS)}; empty: as preset.")
_LATENT_SIZE = flags.DEFINE_integer("latent_size", None, "L, for latent projections.")
_SHARED_SIZE = flags.DEFINE_integer("shared_size", None, "Width of shared experts.")
_RUN = flags.DEFINE_list("run", [], f"Two backends to compare: {', '.join(EXPERTS_BACKENDS)}.")
_TIME = flags.DEFINE_list("time", [], "Backends whose prefill is timed, in place of the tables.")
_GRADIENTS = flags.DEFINE_bool("gradients", False, "With --time: of the gradients.")
_LAYERS = flags.DEFINE_integer("layers", 4, "With --run: how many of the preset's layers.")
_ROWS = flags.DEFINE_integer("rows", 4, "With --run: rows of the batch.")
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 32, "With --run: tokens of each row.")
_SEED = flags.DEFINE_integer("seed", 0, "With --run and --time: of weights and inputs.")


def main(argv: list[str]) -> None:
    """Checks the flags and prints; exits 1 with one line if anything is wrong."""
    if len(argv) > 1:
        sys.exit(f"backends takes flags only; left over: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    console = Console(soft_wrap=False, width=None if sys.stdout.isatty() else 160)
    try:
        config = _config()
        if _RUN.value:
            sys.exit(_run(config, console))
        if _TIME.value:
            _time(config, console)
            return
        _print_tables(config, console)
    except (ValueError, NotImplementedError) as error:
        sys.exit(f"backends: {error}")


def _config():
    if _PRESET.value not in PRESETS:
        raise ValueError(f"--preset is {_PRESET.value!r}; expected one of {', '.join(PRESETS)}")
    if _DTYPE.value not in DTYPES:
        raise ValueError(f"--dtype is {_DTYPE.value!r}; expected one of {', '.join(DTYPES)}")
    config = PRESETS[_PRESET.value]
    return dataclasses.replace(
        config,
        hidden_act=_ACTIVATION.value or config.hidden_act,
        moe_latent_size=_LATENT_SIZE.value,
        moe_shared_expert_intermediate_size=_SHARED_SIZE.value,
    )


def _print_tables(config, console: Console) -> None:
    tokens = [_whole("tokens", value) for value in _TOKENS.value]
    names = _PLATFORMS.value or [resolve_platform(), "ascend"]
    platforms = list(dict.fromkeys(map(resolve_platform, names)))
    request = ExpertsRequest(
        platform=platforms[0],
        phase="decode",
        T=1,
        K=config.num_experts_per_tok,
        E=config.num_experts,
        width=config.moe_latent_size or config.hidden_size,
        I=config.moe_intermediate_size,
        dtype=_DTYPE.value,
        activation=config.hidden_act,
        latent=config.moe_latent_size is not None,
        shared=config.moe_shared_expert_intermediate_size is not None,
    )
    device = jax.devices()[0].device_kind
    console.print(tables.declared(), tables.rules())
    console.print(tables.chosen(request, config.hidden_size, platforms, tokens, device))


def _time(config, console: Console) -> None:
    if unknown := [name for name in _TIME.value if name not in EXPERTS_BACKENDS]:
        raise ValueError(f"--time has {unknown}; expected of {', '.join(EXPERTS_BACKENDS)}")
    tokens = [_whole("tokens", value) for value in _TOKENS.value]
    measured = timing.measure(
        config,
        jnp.dtype(_DTYPE.value),
        _TIME.value,
        tokens,
        _SEED.value,
        gradients=_GRADIENTS.value,
    )
    console.print(tables.timed(measured))
    what = "gradients" if _GRADIENTS.value else "prefill"
    console.print(f"{_PRESET.value}, {what}, {_DTYPE.value}, {_environment()}")


def _environment() -> str:
    commit = checked_out_commit() or "unknown"
    return f"{jax.devices()[0].device_kind}, jax {jax.__version__}, commit {commit[:12]}"


def _run(config, console: Console) -> int:
    names = tuple(_RUN.value)
    if len(names) != 2 or len(set(names)) != 2 or not set(names) <= EXPERTS_BACKENDS.keys():
        raise ValueError(
            f"--run is {','.join(names)}; expected two of {', '.join(EXPERTS_BACKENDS)}"
        )
    for flag in (_LAYERS, _ROWS, _NEW_TOKENS):
        _whole(flag.name, flag.value)
    if "pallas_interpret" in names:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    config = dataclasses.replace(
        config, num_hidden_layers=min(_LAYERS.value, config.num_hidden_layers)
    )
    model = Qwen3Moe(config, rngs=nnx.Rngs(_SEED.value), dtype=jnp.dtype(_DTYPE.value))
    draw = np.random.default_rng(_SEED.value)
    prompts = draw.integers(config.vocab_size, size=(_ROWS.value, 16)).tolist()
    found = agreement.compare(model, prompts, names, _NEW_TOKENS.value)

    device = jax.devices()[0].device_kind
    console.print(tables.ran(found.record, device))
    total = _ROWS.value * _NEW_TOKENS.value
    console.print(
        f"{_PRESET.value}, {config.num_hidden_layers} layers, {_DTYPE.value}, {_environment()}:\n"
        f"{found.compared} of {total} tokens compared, {len(found.differences)} rows differ"
    )
    for d in found.differences:
        verdict = "a tie" if d.is_tie else "NOT A TIE"
        console.print(
            f"  row {d.row}, token {d.index}: {d.tokens[0]} and {d.tokens[1]}; float32 logits "
            f"{d.gap:.3g} apart, off by {d.error:.3g} in {_DTYPE.value}: {verdict}"
        )
    console.print("the tokens agree" if found.holds else "the tokens DIFFER")
    return 0 if found.holds else 1


def _whole(flag: str, value) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError(f"--{flag} has {value!r}; expected whole numbers above 0")
    return number


if __name__ == "__main__":
    app.run(main)
