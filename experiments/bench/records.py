"""The scripts' result files: one a device and preset, as JSON lines.

    {"kind": "record", "format": 2, "preset": "qwen3_30b_a3b"}
    {"kind": "run", "device": "h100", "commit": ..., "read_ceiling_tbps": 3.23, ...}
    {"kind": "layout", "run": 0, "name": "expert_major", "tokens": 8, "chain_us": 161.2, ...}
    {"kind": "baseline", "run": 0, "name": "xla_gather", "tokens": 8, "routing": "zipf", ...}

A row's `run` is the run that it was measured in, because a later run may add to a file. Fields
that have their default are left out. What other projects measured elsewhere is in ELSEWHERE.
The rows here are compare_layouts'; other scripts' are of other kinds, as in decode_records.py.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from experiments.bench.environment import Environment
from experiments.bench.routings import floor_us

FORMAT = 2
RESULTS = pathlib.Path(__file__).resolve().parents[2] / "results"
ELSEWHERE = RESULTS / "compare_layouts" / "elsewhere.json"


@dataclasses.dataclass(kw_only=True)
class Row:
    """One candidate at one number of tokens and one routing; None where a figure does not apply.

    Attributes:
      run: where and how it was measured.
      kind: "layout" or "baseline".
      dtype: the output's.
      chain_us: a layer's time inside a chain of layers, the median over repeats.
      chain_us_spread: the distance between the repeats' quartiles, us.
      device_us: the sum of a layer's kernel durations.
      unique_experts: mean over the timed routings, as unique_bytes and requested_bytes are.
      rel_error: ||y - ref|| / ||ref|| of the output in `dtype`, ref in float32.
      rel_error_before_rounding: the same of a float32 output.
      rounding_error: the same of the reference, once it is rounded to `dtype`.
      max_error: max |y - ref|.
      same_bits_repeated: whether runs on one input agree in every bit.
      same_bits_alone: whether a token has the same bits in the batch, turned round, and alone.
      config: a layout's Config; for others what was seen of them. "error" or "skipped" in it says
        why figures are missing.
    """

    run: Environment
    kind: str
    name: str
    tokens: int
    routing: str = "uniform"
    dtype: str = "bf16"
    chain_us: float | None = None
    chain_us_spread: float | None = None
    device_us: float | None = None
    unique_experts: float | None = None
    unique_bytes: float | None = None
    requested_bytes: float | None = None
    rel_error: float | None = None
    rel_error_before_rounding: float | None = None
    rounding_error: float | None = None
    max_error: float | None = None
    same_bits_repeated: bool | None = None
    same_bits_alone: bool | None = None
    backend: str | None = None
    config: dict[str, Any] | None = None

    @property
    def key(self) -> tuple:
        """What a file has one row of."""
        return self.name, self.tokens, self.routing, self.dtype

    @property
    def floor_us(self) -> float | None:
        """Microseconds to read the unique bytes at the run's read ceiling."""
        if self.unique_bytes is None or self.run.read_ceiling_tbps is None:
            return None
        return floor_us(self.unique_bytes, self.run.read_ceiling_tbps)

    @property
    def times_floor(self) -> float | None:
        """chain_us over the floor."""
        if self.chain_us is None or self.floor_us is None:
            return None
        return self.chain_us / self.floor_us

    @property
    def ceiling_share(self) -> float | None:
        """unique_tbps over the read ceiling."""
        return None if self.times_floor is None else 1 / self.times_floor

    @property
    def unique_tbps(self) -> float | None:
        """Unique bytes over chain_us; None without a read ceiling to hold it against."""
        return None if self.times_floor is None else self.unique_bytes / self.chain_us / 1e6

    @property
    def requested_tbps(self) -> float | None:
        """Requested bytes over chain_us."""
        return None if self.times_floor is None else self.requested_bytes / self.chain_us / 1e6

    @property
    def layout(self) -> str:
        """The layout that ran; where a mode was asked for, what it chose."""
        return (self.config or {}).get("layout", self.name)

    def note(self, **notes: Any) -> None:
        """Adds to config."""
        self.config = {**(self.config or {}), **notes}

    @property
    def error(self) -> str | None:
        """What went wrong, if anything did."""
        return (self.config or {}).get("error")


@dataclasses.dataclass(kw_only=True)
class Record:
    """The rows of one preset on one device, all of one kind's class."""

    preset: str
    rows: list[Any]

    def routings(self) -> list[str]:
        """The routings that there are rows of."""
        return list(dict.fromkeys(row.routing for row in self.rows))

    def of(self, routing: str = "uniform", dtype: str = "bf16") -> list[Row]:
        """The rows of one routing and output dtype."""
        return [row for row in self.rows if (row.routing, row.dtype) == (routing, dtype)]

    def updated(self, newer: list[Any]) -> "Record":
        """With these rows in the place of those of the same key, and behind the others."""
        keys = {row.key for row in newer}
        return Record(
            preset=self.preset, rows=[row for row in self.rows if row.key not in keys] + newer
        )


# What a line of each kind is read as.
KINDS: Mapping[str, type] = {"layout": Row, "baseline": Row}

# Row fields that hold no JSON value of their own, or come first in a line.
_LEADING = ("kind", "run")


def write_record(path: pathlib.Path, record: Record) -> None:
    """Writes the file anew, whole or not at all; what is not finite is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    runs: list[Environment] = []
    lines = []
    for row in record.rows:
        if row.run not in runs:
            runs.append(row.run)
        fields = {
            field.name: _finite(getattr(row, field.name))
            for field in dataclasses.fields(row)
            if field.name not in _LEADING
        }
        defaults = {field.name: field.default for field in dataclasses.fields(row)}
        lines.append(
            {"kind": row.kind, "run": runs.index(row.run)}
            | {name: value for name, value in fields.items() if value != defaults[name]}
        )
    head = [{"kind": "record", "format": FORMAT, "preset": record.preset}]
    head += [{"kind": "run"} | _finite(dataclasses.asdict(run)) for run in runs]
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in (*head, *lines))
    # A run killed here, or a full disk, leaves the file that was saved before.
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def begin_record(
    path: pathlib.Path, preset: str, kinds: Mapping[str, type], *, add: bool = False
) -> Record:
    """What a run's record begins with: no rows, or with `add` those that are there.

    Asked before the work, because scripts name their files alike.

    Args:
      path: where the record will be.
      preset: its name.
      kinds: of the script's rows.
      add: whether rows that are there are kept.

    Raises:
      ValueError: the file is another script's, and would be lost; or with `add`, as read_record.
    """
    if not path.exists():
        return Record(preset=preset, rows=[])
    if add:
        return read_record(path, kinds)
    found = set(re.findall(r'^{"kind": "(\w+)"', path.read_text(errors="replace"), re.MULTILINE))
    if others := sorted(found - {"record", "run", *kinds}):
        raise ValueError(
            f"{path} has rows of kind {', '.join(others)}, which another script wrote; expected "
            "another --out, or no such file"
        )
    return Record(preset=preset, rows=[])


def read_record(path: pathlib.Path, kinds: Mapping[str, type] = KINDS) -> Record:
    """Reads a file that `write_record` wrote.

    Args:
      path: the file.
      kinds: what a row of each kind is read as; other kinds are errors.

    Raises:
      ValueError: a line is none of this format; names the line and the field.
    """
    record, runs = None, []
    for number, text in enumerate(pathlib.Path(path).read_text().splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        kind = line.pop("kind", None) if isinstance(line, dict) else None
        if (kind == "record") != (number == 1):
            raise ValueError(f"{where}: kind is {kind!r}; expected record on line 1 only")
        if kind == "record":
            if line.get("format") != FORMAT:
                raise ValueError(
                    f"{where}: format is {line.get('format')!r}; expected {FORMAT}, which this "
                    "code writes"
                )
            record = Record(preset=line.get("preset"), rows=[])
        elif kind == "run":
            runs.append(_make(where, Environment, line))
        elif kind in kinds:
            if line.get("run") not in range(len(runs)):
                raise ValueError(
                    f"{where}: run is {line.get('run')!r}; expected 0 to {len(runs) - 1}"
                )
            fields = line | {"kind": kind, "run": runs[line["run"]]}
            record.rows.append(_make(where, kinds[kind], fields))
        else:
            accepted = ", ".join(["run", *kinds])
            raise ValueError(f"{where}: kind is {kind!r}; expected one of {accepted}")
    if record is None:
        raise ValueError(f"{path} is empty; expected kind record on line 1")
    return record


def _make(where: str, schema: type, fields: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(schema)}
    needed = {
        field.name for field in dataclasses.fields(schema) if field.default is dataclasses.MISSING
    }
    if wrong := (fields.keys() - known) | (needed - fields.keys()):
        raise ValueError(f"{where}: missing or unknown fields {sorted(wrong)}")
    return schema(**fields)


def _finite(value: Any) -> Any:
    """The value with floats that JSON cannot hold as None, and the others at 10 digits."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.10g}") if math.isfinite(value) else None
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """What another project's kernels took on such a device, measured by other scripts.

    Attributes:
      us: microseconds for each of `tokens`.
      beside_us: what "auto" took in the same session; empty if it was not run.
      rel_errors: the least and the largest relative error; empty if not measured.
      source: what was measured, by whom and when.
    """

    name: str
    device: str
    preset: str
    tokens: tuple[int, ...]
    us: tuple[float, ...]
    beside_us: tuple[float, ...]
    rel_errors: tuple[float, ...]
    source: str


def measured_elsewhere(device: str, preset: str) -> list[Elsewhere]:
    """The rows of ELSEWHERE for a device's short name and a preset; none without the file."""
    if not ELSEWHERE.exists():  # an installed package has no results
        return []
    rows = json.loads(ELSEWHERE.read_text())
    made = [
        Elsewhere(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
        for row in rows
    ]
    return [row for row in made if (row.device, row.preset) == (device, preset)]
