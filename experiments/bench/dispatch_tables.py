"""The dispatch as tables: what backends declare, the rules, what is chosen, what ran."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import rich.table

from experiments.bench.backend_trials import TimedBackend
from moe_jax.attention import ATTENTION_BACKENDS
from moe_jax.config import Qwen3MoeConfig
from moe_jax.decode_step import LAYERS_BACKENDS
from moe_jax.dispatch import PHASES, RULES, BackendChoice, Request, choose_backend
from moe_jax.experts import EXPERTS_BACKENDS, ExpertsRequest
from moe_jax.experts.portable import form_of
from moe_jax.layers_request import LayersRequest
from moe_jax.parallelism import Parallelism
from pallas_kernels.decode_experts import choose_layout

_ALL = "all"
# Op -> its backends.
_BACKENDS = {
    "layers": LAYERS_BACKENDS,
    "experts": EXPERTS_BACKENDS,
    "attention": ATTENTION_BACKENDS,
}
_CAPACITY = 64  # slots of a cache's row; generation takes multiples of it


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
    config: Qwen3MoeConfig,
    platforms: Sequence[str],
    tokens: Sequence[int],
    dtype: str,
    parallelism: Parallelism | None = None,
) -> rich.table.Table:
    """What would run all layers of a decode step; other phases have the blocks.

    Args:
      config: the model's.
      platforms: as resolve_platform returns them.
      tokens: values of T, which are rows here.
      dtype: of the model.
      parallelism: a mesh, of which T is what all its devices have.
    """
    where = ""
    if parallelism is not None:
        sizes = ", ".join(f"{axis} {size}" for axis, size in parallelism.mesh.shape.items())
        where = f", on a mesh of {sizes}"
    table = _table(
        f"What would run the layers of a decode step, T rows with one new token each{where}",
        ["platform", "phase", "T", "backend"],
        ["why"],
    )
    for platform in platforms:
        for T in tokens:
            request = LayersRequest.of(
                config,
                platform=platform,
                phase="decode",
                T=T,
                C=_CAPACITY,
                dtype=dtype,
                parallelism=parallelism,
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
