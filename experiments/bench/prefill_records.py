"""The rows of prefill_speed, their operations, and their table.

    {"kind": "prefill", "run": 0, "name": "generate", "batch": 1, "tokens": 512, "ms": 31.2, ...}
    {"kind": "product", "run": 0, "name": "to weights, gate and up", "tokens": 8192, ...}

The file around them is that of records.py.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.bench import records
from experiments.bench.environment import Environment
from moe_jax.config import Qwen3MoeConfig

# Dense bf16, by the datasheets; utilisation is against these.
PEAK_TFLOPS = {"h100": 989.0, "h200": 989.0}
_TITLES = {
    "prefill": "To the first token",
    "training": "Forward and backward",
    "product": "Grouped products of one layer",
}


@dataclasses.dataclass(kw_only=True)
class PrefillRow:
    """One time; None where a figure does not apply or was not taken.

    Attributes:
      run: where and how it was measured.
      kind: "prefill", "training" or "product".
      name: what was timed: "generate", "transformers", "experts", a number of layers, a product.
      tokens: of each row.
      batch: rows.
      ms: the median over repeats.
      ms_spread: the distance between the fastest and the slowest, ms.
      flop: floating-point operations that the result needs: those of the experts that were chosen,
        of what a causal mask leaves, and of the head where a token is predicted.
      compile_s: seconds of the first call beyond a later one.
      versions: of the baseline's libraries.
      notes: what a reader should know, "error" among them.
    """

    run: Environment
    kind: str
    name: str
    tokens: int
    batch: int = 1
    ms: float | None = None
    ms_spread: float | None = None
    flop: float | None = None
    compile_s: float | None = None
    versions: dict[str, str] | None = None
    notes: dict[str, Any] | None = None

    @property
    def key(self) -> tuple:
        """What a file has one row of."""
        return self.kind, self.name, self.batch, self.tokens

    @property
    def tokens_per_s(self) -> float | None:
        """Of all rows."""
        return None if self.ms is None else 1e3 * self.batch * self.tokens / self.ms

    @property
    def tflops(self) -> float | None:
        """Operations a second, in 10**12."""
        return None if self.ms is None or self.flop is None else self.flop / self.ms / 1e9

    @property
    def utilisation(self) -> float | None:
        """Of the device's peak; None where that is not known."""
        peak = PEAK_TFLOPS.get(self.run.device)
        return None if peak is None or self.tflops is None else self.tflops / peak

    @property
    def error(self) -> str | None:
        """What went wrong, if anything did."""
        return (self.notes or {}).get("error")


KINDS: Mapping[str, type] = dict.fromkeys(_TITLES, PrefillRow)


def read_record(path: pathlib.Path) -> records.Record:
    """Reads a file of prefill_speed.

    Raises:
      ValueError: a line is none of this format; names the line and the field.
    """
    return records.read_record(path, KINDS)


def expert_flop(config: Qwen3MoeConfig, tokens: int) -> float:
    """Of one layer's experts, forward: three products for each of a token's K experts."""
    width = config.moe_latent_size or config.hidden_size
    return 6.0 * tokens * config.num_experts_per_tok * width * config.moe_intermediate_size


def forward_flop(config: Qwen3MoeConfig, batch: int, tokens: int, predicted: int) -> float:
    """Of a model whose layers all have experts, without latent projections and shared experts.

    Args:
      config: the model's.
      batch: rows.
      tokens: of each row.
      predicted: positions of each row that the head is applied to.
    """
    H, D = config.hidden_size, config.head_dim
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    weights = H * D * (2 * heads + 2 * kv) + H * config.num_experts  # q, k, v, o and the router
    keys = (tokens + 1) / 2  # that a query sees on average
    a_layer = 2.0 * batch * tokens * weights
    a_layer += 4.0 * batch * tokens * keys * heads * D
    a_layer += expert_flop(config, batch * tokens)
    head = 2.0 * batch * predicted * H * config.vocab_size
    return config.num_hidden_layers * a_layer + head


def failures(rows: Sequence[PrefillRow]) -> list[str]:
    """A line for each row that failed."""
    return [
        f"{row.name}, batch {row.batch}, {row.tokens} tokens failed: {row.error}"
        for row in rows
        if row.error
    ]


def print_rows(console: Console, rows: Sequence[PrefillRow]) -> None:
    """Prints a table for each kind, and what failed."""
    for kind, title in _TITLES.items():
        of_kind = [row for row in rows if row.kind == kind]
        if not of_kind:
            continue
        table = Table(title=f"{title}, {of_kind[0].run.device_kind}", title_justify="left")
        for name in ("what", "batch", "tokens", "ms", "spread", "tok/s", "TFLOP/s", "of the peak"):
            table.add_column(name, justify="left" if name == "what" else "right")
        for row in of_kind:
            figures = (row.ms, row.ms_spread, row.tokens_per_s, row.tflops, row.utilisation)
            formats = ("{:.3f}", "{:.3f}", "{:.0f}", "{:.1f}", "{:.1%}")
            shown = [
                "-" if value is None else text.format(value)
                for value, text in zip(figures, formats, strict=True)
            ]
            table.add_row(row.name, str(row.batch), str(row.tokens), *shown)
        console.print(table)
    for line in failures(rows):
        console.print(f"- {line}", highlight=False, markup=False)
