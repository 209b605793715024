"""Whether two checkpoints say the same, bit for bit, and a checksum of what they say."""

import dataclasses
import hashlib

import numpy as np

from moe_jax.checkpoints.sources import Progress, Source


def differences(
    expected: Source, found: Source, progress: Progress | None = None
) -> tuple[list[str], str]:
    """Compares two sources, one parameter of each at a time.

    Returns:
      The parameters that differ in shape, dtype or any bit, or that only one has, and "config" if
      the configs differ in more than the keys that no model reads; and the SHA-256 of all of
      found's parameters in the model's order, each preceded by its name, dtype and shape.
    """
    different = [name for name in expected.shapes if name not in found.shapes]
    if _model_config(expected) != _model_config(found):
        different.append("config")
    checksum = hashlib.sha256()
    done = 0
    for name, struct in found.shapes.items():
        there = _bytes(found, name)
        checksum.update(f"{name} {struct.dtype} {list(struct.shape)}\n".encode())
        checksum.update(there)
        same = expected.shapes.get(name) == struct and np.array_equal(_bytes(expected, name), there)
        if not same:
            different.append(name)
        done += there.size
        if progress is not None:
            progress(done, found.nbytes)
    return different, checksum.hexdigest()


def _bytes(source: Source, name: str) -> np.ndarray:
    return np.ascontiguousarray(source.read(name)).reshape(-1).view(np.uint8)


def _model_config(source: Source):
    return dataclasses.replace(source.config, extra={})
