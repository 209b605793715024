"""Whether two checkpoints say the same, bit for bit, and a checksum of what they say."""

import dataclasses
import hashlib

import numpy as np

from moe_jax.checkpoints.readers import Progress, Reader


def differences(
    expected: Reader, found: Reader, progress: Progress | None = None
) -> tuple[list[str], str]:
    """Compares two readers, one parameter of each at a time.

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


def _bytes(reader: Reader, name: str) -> np.ndarray:
    return np.ascontiguousarray(reader.read(name)).reshape(-1).view(np.uint8)


def _model_config(reader: Reader):
    return dataclasses.replace(reader.config, extra={})
