"""The result file: JSON lines, an environment record first, then one record a measurement."""

import dataclasses
import json
import math
import pathlib
from typing import Any


@dataclasses.dataclass(kw_only=True)
class Environment:
    """Where and how a run was made; read_ceiling_tbps is None without a GPU."""

    kind: str = "environment"
    device: str
    device_kind: str
    jax: str
    jaxlib: str
    driver: str | None
    python: str
    commit: str | None
    command: str
    date: str
    seed: int
    repeats: int
    read_ceiling_tbps: float | None


@dataclasses.dataclass(kw_only=True)
class Measurement:
    """One candidate at one number of tokens; None where a figure does not apply.

    Attributes:
      kind: "layout" or "baseline".
      dtype: the output's.
      chain_us: a layer's time inside a chain of layers, the median over repeats.
      chain_us_spread: the distance between the repeats' quartiles, us.
      device_us: the sum of a layer's kernel durations.
      unique_experts: mean over the timed routings, as unique_bytes and requested_bytes are.
      unique_tbps: unique_bytes / chain_us; requested_tbps likewise.
      ceiling_share: unique_tbps / read_ceiling_tbps, equal to floor / chain_us.
      rel_error: ||y - ref|| / ||ref|| of the output in `dtype`, ref in float32.
      rel_error_before_rounding: the same of a float32 output.
      max_error: max |y - ref|.
      same_bits_repeated: whether runs on one input agree in every bit.
      same_bits_alone: whether a token has the same bits in the batch, turned round, and alone.
      config: a layout's Config; for others what was seen of them. "error" or "skipped" in it says
        why figures are missing.
    """

    kind: str
    name: str
    preset: str
    tokens: int
    routing: str
    dtype: str
    chain_us: float | None = None
    chain_us_spread: float | None = None
    device_us: float | None = None
    unique_experts: float | None = None
    unique_bytes: float | None = None
    requested_bytes: float | None = None
    unique_tbps: float | None = None
    requested_tbps: float | None = None
    ceiling_share: float | None = None
    rel_error: float | None = None
    rel_error_before_rounding: float | None = None
    max_error: float | None = None
    same_bits_repeated: bool | None = None
    same_bits_alone: bool | None = None
    backend: str | None = None
    config: dict[str, Any] | None = None

    def set_chain(self, us: float, spread_us: float, ceiling_tbps: float | None) -> None:
        """Stores a chain time and what follows from it."""
        self.chain_us, self.chain_us_spread = us, spread_us
        if ceiling_tbps is None:  # a bandwidth off the device's own ceiling would mean nothing
            return
        self.unique_tbps = self.unique_bytes / us / 1e6
        self.requested_tbps = self.requested_bytes / us / 1e6
        self.ceiling_share = self.unique_tbps / ceiling_tbps

    def note(self, **notes: Any) -> None:
        """Adds to config."""
        self.config = {**(self.config or {}), **notes}

    @property
    def error(self) -> str | None:
        """What went wrong, if anything did."""
        return (self.config or {}).get("error")


# Fields that files from before do not have.
_ADDED = {"same_bits_repeated", "same_bits_alone"}


def write(path: pathlib.Path, environment: Environment, measurements: list[Measurement]) -> None:
    """Writes the file anew, whole or not at all; what is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [_to_json(record) for record in (environment, *measurements)]
    # A run killed here, or a full disk, leaves the file that was saved before.
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text("\n".join(lines) + "\n")
    unfinished.replace(path)


def read(path: pathlib.Path) -> tuple[Environment, list[Measurement]]:
    """Reads a file that `write` wrote.

    Raises:
      ValueError: a line is no record of this schema; names the line and the field.
    """
    records = []
    for number, line in enumerate(pathlib.Path(path).read_text().splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        kind = fields.get("kind") if isinstance(fields, dict) else None
        if kind not in ("environment", "layout", "baseline"):
            raise ValueError(f"{where}: kind is {kind!r}; expected environment, layout or baseline")
        if (kind == "environment") != (number == 1):
            raise ValueError(f"{where}: kind is {kind!r}; expected environment on line 1 only")
        schema = Environment if kind == "environment" else Measurement
        expected = {field.name for field in dataclasses.fields(schema)}
        if difference := (expected ^ fields.keys()) - (_ADDED & expected):
            raise ValueError(f"{where}: missing or unknown fields {sorted(difference)}")
        records.append(schema(**fields))
    if not records:
        raise ValueError(f"{path} is empty; expected an environment record on line 1")
    return records[0], records[1:]


def _to_json(record: Environment | Measurement) -> str:
    return json.dumps(_finite(dataclasses.asdict(record)), allow_nan=False)


def _finite(value: Any) -> Any:
    """The value with floats that JSON cannot hold as None, and the others at 10 digits."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.10g}") if math.isfinite(value) else None
    return value
