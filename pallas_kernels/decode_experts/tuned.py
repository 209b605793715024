"""Which layout and config a measured table gives: data/<device>.json in this folder.

The tables are written by `python -m experiments.tune`; tuned_tables.py says what is in them.

Which entry serves T tokens: that of the smallest measured T which is not below, among the buckets
1, 2, 4, ..., 128. A table may have measured only some of them for a shape: with entries at 1, 8 and
64, 8 serves 2 to 8 and 64 serves 9 to 64. Beyond the largest, "auto" has no entry and "invariant"
has the largest one's, for it must not change the order of sums; choice.py takes its layout alone.
"""

import functools
import pathlib
import re
import warnings
from typing import NamedTuple

import jax

from pallas_kernels.decode_experts.tuned_tables import Entry, Table, TableError, parse
from pallas_kernels.decode_experts.weights import ExpertShapes

# Where the tables lie; a test may point it elsewhere.
FOLDER = pathlib.Path(__file__).parent / "data"


class Found(NamedTuple):
    """The entry that serves a call, or None; and why, in words."""

    entry: Entry | None
    why: str


def device_slug(device_kind: str) -> str:
    """A short name for files: h100 for "NVIDIA H100 80GB HBM3", cpu for "cpu"."""
    model = re.search(r"\b(gh|gb|[abhlv])\d{2,3}s?\b", device_kind.lower())
    if model:
        return model.group()
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") or "unknown"


def find(device: str, shapes: ExpertShapes, T: int, *, invariant: bool) -> Found:
    """Looks for the entry that serves T tokens.

    Args:
      device: the device's kind, as `jax.devices()[0].device_kind`.
      shapes: the layer's sizes, which must be an entry's exactly.
      T: tokens in the batch.
      invariant: whether to look among the entries that agree in the order of sums.
    """
    path = FOLDER / f"{device_slug(device)}.json"
    table = load(path)
    if table is None:
        return Found(None, f"there is no table for {device}")
    if table.device_kind != device:
        return Found(None, f"{path.name} was measured on {table.device_kind}, not on {device}")
    entries = table.invariant if invariant else table.fastest
    by_T = {entry.T: entry for entry in entries if entry.shapes == shapes}
    if not by_T:
        return Found(None, f"{path.name} has no entry for {shapes}")
    bucket = serving_bucket(tuple(by_T), T, or_largest=invariant)
    if bucket is None:
        return Found(None, f"{path.name} ends at T = {max(by_T)} for {shapes}")
    entry = by_T[bucket]
    return Found(entry, f"measured on {device}: {entry.us:.1f} us at T = {entry.T} ({path.name})")


def serving_bucket(measured: tuple[int, ...], T: int, *, or_largest: bool) -> int | None:
    """The smallest measured T that is not below; beyond the largest that one, or None."""
    fitting = [bucket for bucket in measured if bucket >= T]
    if fitting:
        return min(fitting)
    return max(measured) if or_largest else None


@functools.cache
def load(path: pathlib.Path) -> Table | None:
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
    load.cache_clear()
