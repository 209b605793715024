"""The format of a tuned table: one JSON file a device, small enough to read.

    {
      "format": 1,
      "device_kind": "NVIDIA H100 80GB HBM3",
      "jax": "0.11.2",
      "runs": [{"commit": ..., "command": ..., "date": ..., "driver": ..., "jaxlib": ...,
                "read_ceiling_tbps": ..., ...}],
      "fastest": [
        {"of": "qwen3_30b_a3b", "E": 128, "K": 8, "H": 2048, "I": 768, "T": 1,
         "layout": "output_major", "config": {...}, "us": 31.8, "rel_error": 0.00165, "run": 0}
      ],
      "invariant": [...the same, one order of sums for all T of a shape...]
    }

`us` is microseconds of a layer in a chain with L2 cold, `rel_error` ||y - ref|| / ||ref|| of the
bf16 output against float32, `run` an index into `runs`, `of` a name for people.
"""

import dataclasses
import json
import math
from typing import Any

from pallas_kernels.decode_experts.layouts import LAYOUTS
from pallas_kernels.decode_experts.weights import ExpertShapes

# Raise it whenever the meaning of a field changes: older tables are then ignored.
FORMAT = 1
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
_SIZES = ("E", "K", "H", "I")


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
        order = LAYOUTS[entry.layout].SUM_ORDER
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
    kernel = LAYOUTS[layout]
    types = {field.name: field.type for field in dataclasses.fields(kernel.Config)}
    _expect_fields("config", _expect("config", fields, dict), set(types))
    for name, value in fields.items():
        _expect(f"config.{name}", value, types[name])
    config = kernel.Config(**fields)
    try:
        kernel.check_config(config, shapes)
    except (ValueError, TypeError) as error:
        raise TableError(f"{layout} refuses its config for {shapes}: {error}") from None
    return config


def _entry(where: str, row: Any, num_runs: int) -> Entry:
    try:
        names = {field.name for field in dataclasses.fields(Entry)} - {"shapes"} | set(_SIZES)
        _expect_fields("the entry", _expect("the entry", row, dict), names)
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
        shapes = ExpertShapes(**{name: row[name] for name in _SIZES})
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


def _expect(name: str, value: Any, kind: type) -> Any:
    """`value` if it is of this JSON type; a bool is no number here, an int is a fine float."""
    accepted = {float: (int, float)}.get(kind, kind)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise TableError(f"{name} is {value!r}; expected {kind.__name__}")
    return value


def _expect_fields(name: str, found: dict, expected: set[str]) -> None:
    if unknown := sorted(map(repr, found.keys() - expected)):
        raise TableError(
            f"{name} has unknown fields {', '.join(unknown)}; expected {sorted(expected)}"
        )
    if missing := sorted(expected - found.keys()):
        raise TableError(f"{name} lacks {', '.join(missing)}")
