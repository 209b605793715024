"""Tuned tables: which layout and config a measured table gives, one JSON file a device in data/.

`python -m experiments.tune` writes them:

    {
      "format": 2,
      "device_kind": "NVIDIA H100 80GB HBM3",
      "jax": "0.11.2",
      "runs": [{"commit": ..., "command": ..., "date": ..., "driver": ..., "jaxlib": ...,
                "read_ceiling_tbps": ..., ...}],
      "fastest": [
        {"of": "qwen3_30b_a3b", "E": 128, "K": 8, "H": 2048, "I": 768,
         "weights": "bf16", "T": 1, "layout": "output_major", "config": {...}, "us": 31.8,
         "rel_error": 0.00165, "run": 0}
      ],
      "invariant": [...the same, one order of sums for all T of a shape...]
    }

`us` is microseconds of a layer in a chain with L2 cold, `rel_error` ||y - ref|| / ||ref|| of the
bf16 output against float32, `run` an index into `runs`, `of` a name for people.

Which entry serves T tokens: that of the smallest measured T which is not below, among the buckets
1, 2, 4, ..., 128. A table may have measured only some of them for a shape: with entries at 1, 8 and
64, 8 serves 2 to 8 and 64 serves 9 to 64. Beyond the largest, "auto" has no entry and "invariant"
has the largest one's, because it must not change the order of sums; choose_layout.py takes its
layout alone.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
import typing
import warnings
from typing import Any, NamedTuple

import jax

from pallas_kernels.decode_experts.layouts import LAYOUTS
from pallas_kernels.decode_experts.shapes import WEIGHT_FORMATS, ExpertShapes

# Raise it whenever the meaning of a field changes: older tables are then ignored.
FORMAT = 2
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
_SIZES = ("E", "K", "H", "I")
# What an older table leaves out, of an entry and of a layout's config.
_OLDER = {"weights": "bf16"}
_OLDER_CONFIG = {"expert_major": {"gate_up_neurons": 32}}
# Where the tables lie; a test may point it elsewhere.
FOLDER = pathlib.Path(__file__).parent / "data"


class TableError(ValueError):
    """A table that is corrupt or stale; the message says how."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What was measured for one layer at one number of tokens; the fields of the JSON.

    Attributes:
      config: an instance of the layout's Config.
    """

    of: str
    shapes: ExpertShapes
    T: int
    layout: str
    config: Any
    us: float
    rel_error: float
    run: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The content of a file; `runs` are environment records, as JSON values."""

    device_kind: str
    jax: str
    runs: list[dict[str, Any]]
    fastest: list[Entry]
    invariant: list[Entry]


def parse(text: str, running_jax: str) -> Table:
    """Reads a table and checks everything in it.

    Raises:
      TableError: it is no JSON, stale, or a field of it is not what is accepted.
    """
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TableError(f"it is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise TableError(f"it holds a {type(table).__name__}; expected an object")
    if table.get("format") != FORMAT:
        raise TableError(f"its format is {table.get('format')!r}; expected {FORMAT}")
    _expect_fields("the table", table, {"format", *(f.name for f in dataclasses.fields(Table))})
    if table["jax"] != running_jax:
        raise TableError(
            f"it was measured with jax {table['jax']!r} and this is {running_jax}; tune again"
        )
    _expect("device_kind", table["device_kind"], str)
    runs = _expect("runs", table["runs"], list)
    for index, run in enumerate(runs):
        _expect(f"runs[{index}]", run, dict)
    kinds = {}
    for kind in ("fastest", "invariant"):
        rows = _expect(kind, table[kind], list)
        entries = [_entry(f"{kind}[{i}]", row, len(runs)) for i, row in enumerate(rows)]
        if len({(entry.shapes, entry.T) for entry in entries}) < len(entries):
            raise TableError(f"{kind} has two entries of the same sizes and T; expected one")
        kinds[kind] = entries
    orders: dict[ExpertShapes, str] = {}
    for entry in kinds["invariant"]:
        order = LAYOUTS[entry.layout].sum_order
        if orders.setdefault(entry.shapes, order) != order:
            raise TableError(
                f"invariant has different orders of sums for {entry.shapes}; expected layouts of "
                "one order at every T"
            )
    return Table(device_kind=table["device_kind"], jax=table["jax"], runs=runs, **kinds)


def to_text(table: Table) -> str:
    """The table as JSON with a line for each run and each entry, in the order of sizes and T."""
    lines = {
        "runs": table.runs,
        "fastest": [_row(entry) for entry in _sorted(table.fastest)],
        "invariant": [_row(entry) for entry in _sorted(table.invariant)],
    }
    parts = [
        f'"format": {FORMAT}',
        f'"device_kind": {json.dumps(table.device_kind)}',
        f'"jax": {json.dumps(table.jax)}',
    ]
    for name, rows in lines.items():
        inner = ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in rows)
        parts.append(f'"{name}": [\n{inner}\n  ]' if rows else f'"{name}": []')
    return "{\n  " + ",\n  ".join(parts) + "\n}\n"


def make_config(layout: str, fields: dict[str, Any], shapes: ExpertShapes) -> Any:
    """The layout's Config of these fields, all of them, checked for these sizes.

    Raises:
      TableError: the layout or a field is unknown, a field is missing or its value not accepted.
    """
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise TableError(f"layout is {layout!r}; expected one of {sorted(LAYOUTS)}")
    chosen = LAYOUTS[layout]
    types = {field.name: field.type for field in dataclasses.fields(chosen.Config)}
    fields = _OLDER_CONFIG.get(layout, {}) | _expect("config", fields, dict)
    _expect_fields("config", fields, set(types))
    for name, value in fields.items():
        _expect(f"config.{name}", value, types[name])
    config = chosen.Config(**fields)
    try:
        chosen.check(config, shapes)
    except (ValueError, TypeError) as error:
        raise TableError(f"{layout} refuses its config for {shapes}: {error}") from None
    return config


def _entry(where: str, row: Any, num_runs: int) -> Entry:
    try:
        names = {field.name for field in dataclasses.fields(Entry)} - {"shapes"} | set(_SIZES)
        row = _OLDER | _expect("the entry", row, dict)
        _expect_fields("the entry", row, names | set(_OLDER))
        if row["weights"] not in WEIGHT_FORMATS:
            raise TableError(f"weights is {row['weights']!r}; expected one of {WEIGHT_FORMATS}")
        for name in _SIZES:
            if _expect(name, row[name], int) < 1:
                raise TableError(f"{name} is {row[name]}; expected at least 1")
        if _expect("T", row["T"], int) not in BUCKETS:
            raise TableError(f"T is {row['T']}; expected one of {BUCKETS}")
        if not 0 <= _expect("run", row["run"], int) < num_runs:
            raise TableError(f"run is {row['run']}; expected an index into {num_runs} run(s)")
        for name in ("us", "rel_error"):
            value = _expect(name, row[name], float)
            if not (math.isfinite(value) and value > 0):
                raise TableError(f"{name} is {value}; expected a positive number")
        shapes = ExpertShapes(**{name: row[name] for name in (*_SIZES, "weights")})
        config = make_config(row["layout"], row["config"], shapes)
    except TableError as error:
        raise TableError(f"{where}: {error}") from None
    return Entry(
        of=_expect(f"{where}: of", row["of"], str),
        shapes=shapes,
        T=row["T"],
        layout=row["layout"],
        config=config,
        us=row["us"],
        rel_error=row["rel_error"],
        run=row["run"],
    )


def _row(entry: Entry) -> dict[str, Any]:
    return {
        "of": entry.of,
        **dataclasses.asdict(entry.shapes),
        "T": entry.T,
        "layout": entry.layout,
        "config": dataclasses.asdict(entry.config),
        "us": float(f"{entry.us:.4g}"),
        "rel_error": float(f"{entry.rel_error:.3g}"),
        "run": entry.run,
    }


def _sorted(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda e: (dataclasses.astuple(e.shapes), e.T))


def _expect(name: str, value: Any, kind: Any) -> Any:
    """`value` if it is of this JSON type; a bool is no number here, an int is a fine float."""
    accepted = (float, int) if kind is float else typing.get_args(kind) or (kind,)
    if type(value) not in accepted:
        raise TableError(f"{name} is {value!r}; expected {getattr(kind, '__name__', kind)}")
    return value


def _expect_fields(name: str, found: dict, expected: set[str]) -> None:
    if unknown := sorted(map(repr, found.keys() - expected)):
        raise TableError(
            f"{name} has unknown fields {', '.join(unknown)}; expected {sorted(expected)}"
        )
    if missing := sorted(expected - found.keys()):
        raise TableError(f"{name} lacks {', '.join(missing)}")


class Answer(NamedTuple):
    """The entry that serves a call, or None; and why, in words."""

    entry: Entry | None
    why: str


def device_slug(device_kind: str) -> str:
    """A short name for files: h100 for "NVIDIA H100 80GB HBM3", cpu for "cpu"."""
    model = re.search(r"\b(gh|gb|[abhlv])\d{2,3}s?\b", device_kind.lower())
    if model:
        return model.group()
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") or "unknown"


def find(device: str, shapes: ExpertShapes, T: int, *, invariant: bool) -> Answer:
    """Looks for the entry that serves T tokens.

    Args:
      device: the device's kind, as `jax.devices()[0].device_kind`.
      shapes: the layer's sizes, which must be an entry's exactly.
      T: tokens in the batch.
      invariant: whether to look among the entries that agree in the order of sums.
    """
    path = FOLDER / f"{device_slug(device)}.json"
    table = load_table(path)
    if table is None:
        return Answer(None, f"there is no table for {device}")
    if table.device_kind != device:
        return Answer(None, f"{path.name} was measured on {table.device_kind}, not on {device}")
    entries = table.invariant if invariant else table.fastest
    by_T = {entry.T: entry for entry in entries if entry.shapes == shapes}
    if not by_T:
        return Answer(None, f"{path.name} has no entry for {shapes}")
    bucket = serving_bucket(tuple(by_T), T, or_largest=invariant)
    if bucket is None:
        return Answer(None, f"{path.name} ends at T = {max(by_T)} for {shapes}")
    entry = by_T[bucket]
    return Answer(entry, f"measured on {device}: {entry.us:.1f} us at T = {entry.T} ({path.name})")


def serving_bucket(measured: tuple[int, ...], T: int, *, or_largest: bool) -> int | None:
    """The smallest measured T that is not below; beyond the largest that one, or None."""
    fitting = [bucket for bucket in measured if bucket >= T]
    if fitting:
        return min(fitting)
    return max(measured) if or_largest else None


@functools.cache
def load_table(path: pathlib.Path) -> Table | None:
    """The table at `path`, read once; None if there is none, or after a warning if it is no use."""
    try:
        return parse(path.read_text(encoding="utf-8"), jax.__version__)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, TableError) as error:
        warnings.warn(f"the tuned table {path} is ignored: {error}", stacklevel=2)
        return None


def forget() -> None:
    """Has tables read anew, for a process that has changed one."""
    load_table.cache_clear()
