"""Which backend computes what, where and why? Prints the dispatch; --run and --time try experts'.

    python -m experiments.backends
    python -m experiments.backends --platforms=ascend,cuda --tokens=1,64,65 --latent_size=1024
    python -m experiments.backends --run=portable,pallas --layers=4
    python -m experiments.backends --run=portable,auto --layers=4
    python -m experiments.backends --time=portable,grouped,pallas --tokens=64,512,4096

With --run a random model of the preset generates greedily with both backends from the same weights;
printed are what ran and whether the tokens agree, with float32 as the judge of those that do not. A
backend that is named is the experts' in the blocks; "auto" is what the tables choose, which for a
decode step on a GPU is the kernels of all layers.
It exits 1 if they differ by more than bfloat16's rounding. With --time each backend computes one
layer's experts for that many tokens.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import rich.table
from absl import logging
from flax import nnx
from rich.console import Console

from experiments.bench import script
from experiments.bench.backend_trials import TimedBackend, compare_backends, time_backends
from experiments.bench.environment import checked_out_commit
from experiments.bench.script import flag
from experiments.generate import DTYPES
from moe_jax.activations import ACTIVATIONS
from moe_jax.attention import ATTENTION_BACKENDS
from moe_jax.config import Qwen3MoeConfig
from moe_jax.decode_step import LAYERS_BACKENDS
from moe_jax.dispatch import PHASES, RULES, BackendChoice, Request, choose_backend
from moe_jax.experts import EXPERTS_BACKENDS, ExpertsRequest
from moe_jax.experts.portable import form_of
from moe_jax.layers_request import LayersRequest
from moe_jax.model import Qwen3Moe
from moe_jax.platforms import resolve_platform
from moe_jax.presets import PRESETS
from pallas_kernels.decode_experts import choose_layout

_ALL = "all"
# Op -> its backends.
_BACKENDS = {
    "layers": LAYERS_BACKENDS,
    "experts": EXPERTS_BACKENDS,
    "attention": ATTENTION_BACKENDS,
}
_RUNS = collections.ChainMap({"auto": "what the tables choose"}, EXPERTS_BACKENDS)
_CAPACITY = 64  # slots of a cache's row; generation takes multiples of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    preset: str = flag("qwen3_30b_a3b", "Whose sizes.", of=PRESETS)
    platforms: tuple[str, ...] = flag((), "For which to choose; empty: this one and ascend.")
    tokens: tuple[int, ...] = flag((1, 64, 512), "Tokens of a step.", least=1, needs="as 1,64")
    dtype: str = flag("bfloat16", "Of the model.", of=DTYPES)
    activation: str | None = flag(None, "By default the preset's.", of=ACTIVATIONS)
    latent_size: int | None = flag(None, "L, for latent projections.", least=1)
    shared_size: int | None = flag(None, "Width of shared experts.", least=1)
    run: tuple[str, ...] = flag((), "Two backends to compare.", of=_RUNS)
    time: tuple[str, ...] = flag(
        (), "Backends whose prefill is timed, in place of the tables.", of=EXPERTS_BACKENDS
    )
    gradients: bool = flag(False, "With --time: of the gradients.")
    layers: int = flag(4, "With --run: how many of the preset's layers.", least=1)
    rows: int = flag(4, "With --run: rows of the batch.", least=1)
    new_tokens: int = flag(32, "With --run: tokens of each row.", least=1)
    seed: int = flag(0, "With --run and --time: of weights and inputs.", least=0)

    def __post_init__(self):
        if len(self.run) not in (0, 2):
            raise ValueError(f"--run is {','.join(self.run)}; expected two of {', '.join(_RUNS)}")

    def config(self) -> Qwen3MoeConfig:
        """The preset's, with what the flags put in its place."""
        config = PRESETS[self.preset]
        return dataclasses.replace(
            config,
            hidden_act=self.activation or config.hidden_act,
            moe_latent_size=self.latent_size,
            moe_shared_expert_intermediate_size=self.shared_size,
        )


def main(settings: Settings) -> str | None:
    """Prints what was asked for; returns a line if tokens differ.

    Raises:
      ValueError, NotImplementedError: it cannot be done; the message says what is wrong.
    """
    logging.set_verbosity(logging.WARNING)
    console = script.make_console(width=160)
    if settings.run:
        return _run(settings, console)
    if settings.time:
        _time(settings, console)
    else:
        _print_dispatch(settings, console)
    return None


def _print_dispatch(settings: Settings, console: Console) -> None:
    config = settings.config()
    names = settings.platforms or (resolve_platform(), "ascend")
    platforms = list(dict.fromkeys(map(resolve_platform, names)))
    request = ExpertsRequest(
        platform=platforms[0],
        phase="decode",
        T=1,
        K=config.num_experts_per_tok,
        E=config.num_experts,
        width=config.moe_latent_size or config.hidden_size,
        I=config.moe_intermediate_size,
        dtype=settings.dtype,
        activation=config.hidden_act,
        latent=config.moe_latent_size is not None,
        shared=config.moe_shared_expert_intermediate_size is not None,
    )
    device = jax.devices()[0].device_kind
    console.print(declared(), rules())
    console.print(chosen_for_layers(config, platforms, settings.tokens, settings.dtype))
    console.print(chosen(request, config.hidden_size, platforms, settings.tokens, device))


def _time(settings: Settings, console: Console) -> None:
    measured = time_backends(
        settings.config(),
        jnp.dtype(settings.dtype),
        settings.time,
        settings.tokens,
        settings.seed,
        gradients=settings.gradients,
    )
    console.print(timed(measured))
    what = "gradients" if settings.gradients else "prefill"
    console.print(f"{settings.preset}, {what}, {settings.dtype}, {_environment()}")


def _environment() -> str:
    commit = checked_out_commit() or "unknown"
    return f"{jax.devices()[0].device_kind}, jax {jax.__version__}, commit {commit[:12]}"


def _run(settings: Settings, console: Console) -> str | None:
    if "pallas_interpret" in settings.run:
        script.make_interpreter_safe()
    config = settings.config()
    layers = min(settings.layers, config.num_hidden_layers)
    config = dataclasses.replace(config, num_hidden_layers=layers)
    dtype = jnp.dtype(settings.dtype)
    model = Qwen3Moe(config, rngs=nnx.Rngs(settings.seed), dtype=dtype)
    draw = np.random.default_rng(settings.seed)
    prompts = draw.integers(config.vocab_size, size=(settings.rows, 16)).tolist()
    found = compare_backends(model, prompts, settings.run, settings.new_tokens)

    console.print(ran(found.record, jax.devices()[0].device_kind))
    console.print(
        f"{settings.preset}, {layers} layers, {settings.dtype}, {_environment()}:\n"
        f"{found.compared} of {settings.rows * settings.new_tokens} tokens compared, "
        f"{len(found.differences)} rows differ"
    )
    for d in found.differences:
        verdict = "a tie" if d.is_tie else "NOT A TIE"
        console.print(
            f"  row {d.row}, token {d.index}: {d.tokens[0]} and {d.tokens[1]}; float32 logits "
            f"{d.gap:.3g} apart, off by {d.error:.3g} in {settings.dtype}: {verdict}"
        )
    if found.holds:
        console.print("the tokens agree")
    return None if found.holds else "backends: the tokens DIFFER"


def declared() -> rich.table.Table:
    """What each backend says that it can do."""
    table = _table(
        "What each backend declares",
        ["backend", "op", "platforms", "phases", "dtypes: relative error", "activations", "sizes"],
        ["features", "what it is"],
    )
    for op, name, backend in (
        (op, name, backend) for op, named in _BACKENDS.items() for name, backend in named.items()
    ):
        features = (*backend.features, *("gradients",) * backend.gradients)
        table.add_row(
            name,
            op,
            ", ".join(backend.platforms or (_ALL,)),
            _ALL if backend.phases == PHASES else ", ".join(backend.phases),
            "\n".join(f"{dtype}: {bound:g}" for dtype, bound in backend.rel_error.items()),
            ", ".join(backend.activations or (_ALL,)),
            "any" if backend.size_multiple == 1 else f"x {backend.size_multiple}",
            "\n".join(features) or "-",
            backend.what,
        )
    return table


def rules() -> rich.table.Table:
    """The table that "auto" reads, from the top."""
    table = _table(
        'What "auto" reads, from the top', ["op", "platforms", "phases", "T", "backend"], ["why"]
    )
    for rule in RULES:
        table.add_row(
            rule.op,
            ", ".join(rule.platforms or (_ALL,)),
            _ALL if rule.phases == PHASES else ", ".join(rule.phases),
            "any" if rule.most_tokens is None else f"<= {rule.most_tokens}",
            rule.backend,
            rule.why,
        )
    return table


def chosen_for_layers(
    config: Qwen3MoeConfig, platforms: Sequence[str], tokens: Sequence[int], dtype: str
) -> rich.table.Table:
    """What would run all layers of a decode step; other phases have the blocks.

    Args:
      config: the model's.
      platforms: as resolve_platform returns them.
      tokens: values of T, which are rows here.
      dtype: of the model.
    """
    table = _table(
        "What would run the layers of a decode step, T rows with one new token each",
        ["platform", "phase", "T", "backend"],
        ["why"],
    )
    for platform in platforms:
        for T in tokens:
            request = LayersRequest.of(
                config, platform=platform, phase="decode", T=T, C=_CAPACITY, dtype=dtype
            )
            choice = choose_backend(request, LAYERS_BACKENDS)
            table.add_row(platform, "decode", str(T), choice.backend, choice.why)
    return table


def chosen(
    request: ExpertsRequest, H: int, platforms: Sequence[str], tokens: Sequence[int], device: str
) -> rich.table.Table:
    """What would run the experts, for each platform, phase and number of tokens.

    Args:
      request: everything else of the call.
      H: the hidden size, for the title.
      platforms: as resolve_platform returns them.
      tokens: values of T.
      device: the device's kind, for the kernels' layout.
    """
    r = request
    title = f"E = {r.E}, K = {r.K}, H = {H}, I = {r.I}, {r.dtype}, {r.activation}"
    if r.latent:
        title += f", L = {r.width}"
    table = _table(
        f"What would run the experts, in blocks: {', '.join([title, *r.features])}",
        ["platform", "phase", "T", "backend", "layout"],
        ["why"],
    )
    for platform in platforms:
        for phase in PHASES:
            for T in tokens:
                one = dataclasses.replace(request, platform=platform, phase=phase, T=T)
                choice = choose_backend(one, EXPERTS_BACKENDS)
                table.add_row(
                    platform,
                    phase,
                    str(T),
                    choice.backend,
                    _layout(choice, one, device),
                    choice.why,
                )
    return table


def ran(record: Iterable[tuple[Request, BackendChoice]], device: str) -> rich.table.Table:
    """What did run: the distinct calls of a record, with how many layers made each."""
    counts = collections.Counter(record)
    table = _table(
        "What ran",
        ["op", "platform", "phase", "T", "dtype", "layers", "backend", "layout"],
        ["why"],
    )
    for (request, choice), count in counts.items():
        table.add_row(
            request.op,
            request.platform,
            request.phase,
            str(request.T),
            request.dtype,
            str(count),
            choice.backend,
            _layout(choice, request, device),
            choice.why,
        )
    return table


def timed(measurements: Iterable[TimedBackend]) -> rich.table.Table:
    """What time_backends measured."""
    table = _table(
        "Time of one layer's experts",
        ["T", "backend"],
        ["ms", "temporaries, MB", "difference from the first", "lacks"],
    )
    for m in measurements:
        figures = (m.milliseconds, m.temporaries_mb, m.error)
        shown = ["-"] * 3
        if m.milliseconds is not None:
            shown = [
                f.format(v) for f, v in zip(("{:.3f}", "{:.0f}", "{:.1e}"), figures, strict=True)
            ]
        table.add_row(str(m.T), m.backend, *shown, m.lacks)
    return table


def _layout(choice: BackendChoice, request: Request, device: str) -> str:
    """The layout of the experts' kernels, or the form of their portable backend."""
    if not isinstance(request, ExpertsRequest):
        return "-"
    if choice.backend == "portable":
        return form_of(request.T, request.K, request.E)
    if not choice.backend.startswith("pallas"):
        return "-"
    return choose_layout(device, request.shapes, request.T).layout


def _table(title: str, columns: list[str], more: list[str]) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left")
    for column in (*columns, *more):
        table.add_column(column, no_wrap=column in ("backend", "T", "platform", "phase", "layout"))
    return table


run = functools.partial(script.run, Settings, main, one_line=(ValueError, NotImplementedError))

if __name__ == "__main__":
    run()
