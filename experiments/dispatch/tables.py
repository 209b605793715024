"""The dispatch as tables: what each backend declares, the rules, and what they choose."""

import dataclasses
from collections.abc import Iterable, Sequence

import rich.table

from experiments.dispatch.timing import Timed
from moe_jax.experts import BACKENDS, PHASES, RULES, Asked, BackendChoice, choose_backend
from moe_jax.experts.portable import form_of
from pallas_kernels.decode_experts import ExpertShapes, choose_layout

_ALL = "all"
_YES_NO = {True: "yes", False: "-"}


def declared() -> rich.table.Table:
    """What each backend says that it can do."""
    table = _table(
        "What each backend declares",
        ["backend", "platforms", "phases", "dtypes: relative error", "activations", "sizes"],
        ["latent", "shared", "quantised", "gradients", "what it is"],
    )
    for name, backend in BACKENDS.items():
        table.add_row(
            name,
            ", ".join(backend.platforms or (_ALL,)),
            _ALL if backend.phases == PHASES else ", ".join(backend.phases),
            "\n".join(f"{dtype}: {bound:g}" for dtype, bound in backend.rel_error.items()),
            ", ".join(backend.activations or (_ALL,)),
            "any" if backend.size_multiple == 1 else f"x {backend.size_multiple}",
            *(
                _YES_NO[getattr(backend, feature)]
                for feature in ("latent", "shared", "quantised", "gradients")
            ),
            backend.what,
        )
    return table


def rules() -> rich.table.Table:
    """The table that "auto" reads, from the top."""
    table = _table(
        'What "auto" reads, from the top', ["platforms", "phases", "T", "backend"], ["why"]
    )
    for rule in RULES:
        table.add_row(
            ", ".join(rule.platforms) or _ALL,
            _ALL if rule.phases == PHASES else ", ".join(rule.phases),
            "any" if rule.most_tokens is None else f"<= {rule.most_tokens}",
            rule.backend,
            rule.why,
        )
    return table


def chosen(
    asked: Asked, H: int, platforms: Sequence[str], tokens: Sequence[int], device: str
) -> rich.table.Table:
    """What would run for each platform, phase and number of tokens.

    Args:
      asked: everything else of the call.
      H: the hidden size, for the title.
      platforms: as resolve_platform returns them.
      tokens: values of T.
      device: the device's kind, for the kernels' layout.
    """
    a = asked
    features = [word for word, on in (("latent", a.latent), ("shared experts", a.shared)) if on]
    title = f"E = {a.E}, K = {a.K}, H = {H}, I = {a.I}, {a.dtype}, {a.activation}"
    if a.latent:
        title += f", L = {a.width}"
    table = _table(
        f"What would run: {', '.join([title, *features])}",
        ["platform", "phase", "T", "backend", "layout"],
        ["why"],
    )
    for platform in platforms:
        for phase in PHASES:
            for T in tokens:
                one = dataclasses.replace(asked, platform=platform, phase=phase, T=T)
                choice = choose_backend(one, BACKENDS)
                table.add_row(
                    platform,
                    phase,
                    str(T),
                    choice.backend,
                    _layout(choice, one, device),
                    choice.why,
                )
    return table


def ran(record: Iterable[tuple[Asked, BackendChoice]], device: str) -> rich.table.Table:
    """What did run: the distinct calls of a record, with how many layers made each."""
    counts: dict[tuple, int] = {}
    for call in record:
        counts[call] = counts.get(call, 0) + 1
    table = _table(
        "What ran", ["platform", "phase", "T", "dtype", "layers", "backend", "layout"], ["why"]
    )
    for (asked, choice), count in counts.items():
        table.add_row(
            asked.platform,
            asked.phase,
            str(asked.T),
            asked.dtype,
            str(count),
            choice.backend,
            _layout(choice, asked, device),
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


def _layout(choice: BackendChoice, asked: Asked, device: str) -> str:
    """The kernels' layout, or the portable backend's form."""
    if choice.backend == "portable":
        return form_of(asked.T, asked.K, asked.E)
    if not choice.backend.startswith("pallas"):
        return "-"
    shapes = ExpertShapes(E=asked.E, K=asked.K, H=asked.width, I=asked.I)
    return choose_layout(device, shapes, asked.T).layout


def _table(title: str, columns: list[str], more: list[str]) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=column in ("backend", "T", "platform", "phase", "layout"))
    for column in more:
        table.add_column(column)
    return table
