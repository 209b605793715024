"""The dispatch as tables: what each backend declares, the rules, and what they choose."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import rich.table

from experiments.dispatch.timing import Timed
from moe_jax.attention import ATTENTION_BACKENDS
from moe_jax.dispatch import PHASES, RULES, BackendChoice, Request, choose_backend
from moe_jax.experts import EXPERTS_BACKENDS, ExpertsRequest
from moe_jax.experts.portable import form_of
from pallas_kernels.decode_experts import ExpertShapes, choose_layout

_ALL = "all"
_BACKENDS = {"experts": EXPERTS_BACKENDS, "attention": ATTENTION_BACKENDS}  # op -> its backends


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


def chosen(
    request: ExpertsRequest, H: int, platforms: Sequence[str], tokens: Sequence[int], device: str
) -> rich.table.Table:
    """What would run for each platform, phase and number of tokens.

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
        f"What would run: {', '.join([title, *r.features])}",
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


def timed(measurements: Iterable[Timed]) -> rich.table.Table:
    """What experiments.dispatch.timing measured."""
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
    shapes = ExpertShapes(E=request.E, K=request.K, H=request.width, I=request.I)
    return choose_layout(device, shapes, request.T).layout


def _table(title: str, columns: list[str], more: list[str]) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=column in ("backend", "T", "platform", "phase", "layout"))
    for column in more:
        table.add_column(column)
    return table
