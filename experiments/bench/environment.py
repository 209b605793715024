"""Where a run is made: device, versions, commit, and how fast this device reads memory.

The read ceiling is the limit of every bandwidth: the best of a TMA read-only kernel, in several
shapes, and an XLA reduction, both over 4 GB of random bf16 in the process that times the layers.
"""

import dataclasses
import datetime
import functools
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_experts.tuned_tables import device_slug
from pallas_kernels.mosaic.device import launch
from pallas_kernels.mosaic.pipeline import pipeline

_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment:
    """Where and how a run was made; read_ceiling_tbps is None without a GPU."""

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


def describe(
    *, seed: int, repeats: int, commit: str, read_ceiling_tbps: float | None
) -> Environment:
    """Looks at device, versions and checkout; a `commit` that is given goes before the checkout's.

    A copy of a tree on another machine may lie in a checkout of another commit.
    """
    device = jax.devices()[0]
    return Environment(
        device=device_slug(device.device_kind),
        device_kind=device.device_kind,
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        driver=_driver() if device.platform == "gpu" else None,
        python=platform.python_version(),
        commit=commit or checked_out_commit(),
        command=_command(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seed=seed,
        repeats=repeats,
        read_ceiling_tbps=read_ceiling_tbps,
    )


def checked_out_commit() -> str | None:
    """The commit, "-dirty" added if tracked files differ from it; None outside a checkout."""
    if not (_REPOSITORY / ".git").exists():  # a copy of the files inside another checkout
        return None
    commit = _output("git", "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return commit + ("-dirty" if changed else "")


def _driver() -> str | None:
    listed = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return listed.splitlines()[0].strip() if listed else None


def _command() -> str:
    """The command line, with `python -m` as it was typed."""
    script = pathlib.Path(sys.argv[0])
    module = getattr(sys.modules["__main__"], "__spec__", None)
    called = f"python -m {module.name}" if module is not None else f"python {script}"
    return " ".join([called, *map(shlex.quote, sys.argv[1:])])


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(
            command, cwd=_REPOSITORY, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


# One stage: a contiguous 32 KB piece, as wide as a TMA box may be.
ROWS, COLUMNS = 64, 256
_LEAST_BYTES = 4_000_000_000
_READS = 8  # timed reads issued back to back
_SAMPLES = 7


class Variant(NamedTuple):
    """A shape of the TMA kernel: thread blocks on each core, and stages in each block."""

    blocks_a_core: int
    num_stages: int


VARIANTS = (Variant(1, 4), Variant(1, 6), Variant(2, 3), Variant(3, 2))


class ReadCeiling(NamedTuple):
    """The best bandwidth in TB/s, what reached it, and every figure by name (None: it failed)."""

    tbps: float | None
    by: str
    all_tbps: dict[str, float | None]


def tma_read(data: jax.Array, *, blocks: int, num_stages: int, interpret=False) -> jax.Array:
    """Copies all of data [N, COLUMNS] bf16 into shared memory, N a multiple of ROWS * blocks.

    Block b takes tiles b, b + blocks, ... Of each tile that has arrived one row is added up, which
    costs nothing beside the copy and makes the result depend on every tile.

    Returns:
      [blocks, COLUMNS] float32: the sum of the first rows of each block's tiles.
    """
    tiles = data.shape[0] // ROWS
    if data.shape != (tiles * ROWS, COLUMNS) or tiles % blocks:
        raise ValueError(
            f"data has shape {data.shape}; expected [N, {COLUMNS}] with N a multiple of "
            f"{ROWS} * {blocks}"
        )

    def kernel(block_id, data_gmem, sums_gmem, stages, full):
        def load(step, stage, full):
            row = (block_id + step * blocks) * ROWS
            plgpu.copy_gmem_to_smem(data_gmem.at[pl.ds(row, ROWS)], stages.at[stage], full)

        def compute(step, stage, sums):
            row = plgpu.load(stages.at[stage, 0], layout=plgpu.Layout.WG_STRIDED((COLUMNS,), 2))
            return sums + row.astype(jnp.float32)

        zeros = plgpu.layout_cast(
            jnp.zeros((COLUMNS,), jnp.float32), plgpu.Layout.WG_STRIDED((COLUMNS,), 2)
        )
        sums_gmem[block_id, :] = pipeline(
            tiles // blocks, num_stages, full=full, load=load, compute=compute, init=zeros
        )

    return launch(
        kernel,
        name="tma_read",
        num_blocks=blocks,
        out_type=jax.ShapeDtypeStruct((blocks, COLUMNS), jnp.float32),
        scratch_types=[
            plgpu.SMEM((num_stages, ROWS, COLUMNS), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=1, num_barriers=num_stages),
        ],
        interpret=interpret,
    )(data)


def xla_read(data: jax.Array) -> jax.Array:
    """Reduces data [N, COLUMNS] to its sum along both dimensions, float32."""
    return jnp.sum(data, dtype=jnp.float32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_data(key: jax.Array, chunks: int, rows: int) -> jax.Array:
    def one_chunk(chunk_key):
        return jax.random.normal(chunk_key, (rows, COLUMNS), jnp.float32).astype(jnp.bfloat16)

    return lax.map(one_chunk, jax.random.split(key, chunks)).reshape(chunks * rows, COLUMNS)


def measure_read_ceiling() -> ReadCeiling:
    """Measures on the default device, which must be a GPU; frees its 4 GB before returning."""
    core_count = jax.devices()[0].core_count
    # A row count that every variant's number of blocks divides, the element count below 2**31.
    rows_a_chunk = ROWS * core_count * 6
    chunks = -(-_LEAST_BYTES // (rows_a_chunk * COLUMNS * 2))
    data = jax.block_until_ready(_random_data(jax.random.key(0), chunks, rows_a_chunk))
    readers: dict[str, Callable] = {"xla reduction": xla_read}
    for variant in VARIANTS:
        name = f"tma, {variant.blocks_a_core} block(s) a core, {variant.num_stages} stages"
        readers[name] = functools.partial(
            tma_read, blocks=core_count * variant.blocks_a_core, num_stages=variant.num_stages
        )
    figures: dict[str, float | None] = {}
    for name, reader in readers.items():
        try:
            figures[name] = data.nbytes / _seconds(jax.jit(reader), data) / 1e12
        except Exception as error:
            figures[name] = None
            print(f"read ceiling: {name} failed: {error!r}"[:500])
    data.delete()
    measured = {name: tbps for name, tbps in figures.items() if tbps is not None}
    if not measured:
        return ReadCeiling(None, "nothing: every read failed", figures)
    by = max(measured, key=measured.get)
    return ReadCeiling(measured[by], by, figures)


def _seconds(reader: Callable, data: jax.Array) -> float:
    """The median time of a read: 1 + _READS issued back to back, less the time of 1."""
    jax.block_until_ready(reader(data))
    samples = []
    for _ in range(_SAMPLES):
        times = []
        for reads in (1, 1 + _READS):
            start = time.perf_counter()
            for _ in range(reads):
                result = reader(data)
            jax.block_until_ready(result)
            times.append(time.perf_counter() - start)
        samples.append((times[1] - times[0]) / _READS)
    return statistics.median(samples)
