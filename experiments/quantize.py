"""Makes an FP8 checkpoint of a bfloat16 one, as the hub's FP8 models are.

    python -m experiments.quantize --from=Qwen3-30B-A3B --to=out/Qwen3-30B-A3B-FP8

The linear layers and the experts become E4M3 values with a float32 scale for each block of 128 x
128: the block's largest absolute value / 448; rounding is to nearest, ties to even. Router, norms,
embeddings and head stay as they are. Prints each layer's relative error, ||W' - W|| / ||W|| over
its linear layers and experts. One parameter at a time is in memory, and one file (--max_shard_gb).
--to is written beside its place and put there whole. A checkpoint of either format is read.

Needs no accelerator; JAX_PLATFORMS=cpu keeps JAX from taking hold of one.
"""

import collections
import dataclasses
import functools
import math

import rich.table
from absl import logging

from experiments.bench import script
from experiments.bench.script import flag
from experiments.convert_checkpoint import FORMATS, bytes_bar, say
from moe_jax.checkpoints import open_checkpoint, quantised, write_hugging_face, write_orbax
from moe_jax.checkpoints.readers import bytes_of, counter
from moe_jax.json_files import local_path
from moe_jax.quantization import may_be_quantised

_PARTS = ("self_attn", "mlp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    source: str = flag("", "The checkpoint to read.", name="from", needs="a directory")
    to: str = flag("", "The directory to write.", needs="a directory")
    to_format: str = flag("hugging_face", "Of --to.", of=FORMATS)
    block_rows: int = flag(128, "Output rows of a block.", least=1)
    block_columns: int = flag(128, "Input columns of a block.", least=1)
    max_shard_gb: float = flag(
        5.0, "GB (1e9 bytes) of tensors in a safetensors file.", least=1e-9, most=1e9
    )
    overwrite: bool = flag(False, "Whether --to may hold a checkpoint already.")

    def __post_init__(self):
        here = local_path(self.source, "--from").resolve()
        if here == local_path(self.to, "--to").resolve():
            raise ValueError(f"--to is {self.to!r}, as --from is; expected another directory")


def main(settings: Settings) -> None:
    """Quantises, and prints the errors.

    Raises:
      ValueError, NotImplementedError, OSError: it cannot be done; the message says what is wrong.
    """
    logging.set_verbosity(logging.WARNING)  # absl's default shows a page of Orbax's notes
    console = script.make_console()
    source = open_checkpoint(settings.source)
    sizes = {n: bytes_of(struct) for n, struct in source.shapes.items() if may_be_quantised(n)}
    errors = LayerErrors()
    with bytes_bar(console, "quantizing") as progress:
        count = counter(sum(sizes.values()), progress)

        def report(name: str, error: float, norm: float) -> None:
            errors.add(name, error, norm)
            count(sizes[name])

        block = (settings.block_rows, settings.block_columns)
        reader = quantised(source, block=block, report=report)
        shared = {"overwrite": settings.overwrite, "copy_from": settings.source}
        if settings.to_format == "orbax":
            write_orbax(settings.to, reader, **shared)
        else:
            max_shard_bytes = round(settings.max_shard_gb * 1e9)
            write_hugging_face(settings.to, reader, max_shard_bytes=max_shard_bytes, **shared)
    console.print(errors.table())
    say(
        console,
        f"Wrote {settings.to} ({settings.to_format}): {source.nbytes / 1e9:.3f} GB became "
        f"{reader.nbytes / 1e9:.3f} GB; relative error {errors.total:.3e}",
    )


class LayerErrors:
    """Squared norms of errors and weights, added up by layer and part."""

    def __init__(self):
        self._sums: dict[tuple[int, str], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, error: float, norm: float) -> None:
        """Takes one parameter's, as moe_jax.checkpoints.quantised reports them."""
        _, layer, part, *_ = name.split(".")
        sums = self._sums[int(layer), part]
        sums[0] += error
        sums[1] += norm

    def relative(self, layer: int | None = None, part: str | None = None) -> float:
        """||W' - W|| / ||W|| of a layer, a part of it, or of all."""
        chosen = [
            sums
            for (found, kind), sums in self._sums.items()
            if layer in (None, found) and part in (None, kind)
        ]
        error, norm = (sum(column) for column in zip(*chosen, strict=True))
        return math.sqrt(error / norm) if norm else 0.0

    @property
    def total(self) -> float:
        """Of all layers."""
        return self.relative()

    def table(self) -> rich.table.Table:
        """A line for each layer."""
        table = rich.table.Table(title="relative error of the weights", title_justify="left")
        for column in ("layer", *_PARTS, "both"):
            table.add_column(column, justify="right")
        for layer in sorted({layer for layer, _ in self._sums}):
            errors = [self.relative(layer, part) for part in (*_PARTS, None)]
            table.add_row(str(layer), *(f"{error:.3e}" for error in errors))
        return table


run = functools.partial(
    script.run, Settings, main, one_line=(ValueError, NotImplementedError, OSError)
)

if __name__ == "__main__":
    run()
