"""Random inputs of attend, and what it means for its results to be right."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention.reference import reference_attend

# Attended is rounded to bf16, which alone is 1.7e-3.
RELATIVE_BOUND = 3e-3
_D = 128

_reference = jax.jit(reference_attend)


class Size(NamedTuple):
    B: int
    kv: int
    G: int
    C: int
    P: int = 2

    def __str__(self):
        return "-".join(f"{letter}{size}" for letter, size in self._asdict().items())


class Case(NamedTuple):
    """attend's arguments."""

    qkv: jax.Array
    cos: jax.Array
    sin: jax.Array
    q_norm: jax.Array
    k_norm: jax.Array
    lengths: jax.Array
    valid: jax.Array
    keys: jax.Array
    values: jax.Array


def make_case(
    size: Size, lengths: Sequence[int], seed: int, valid: Sequence[int] | None = None
) -> Case:
    """What must not matter is bad: rows of qkv beyond B and keys that are not stored are NaN.

    Values that are not stored are large, because weights of zero multiply them.
    """
    rng = np.random.default_rng(seed)
    B, kv, G, C, P = size
    lengths = np.asarray(lengths, np.int32)
    valid = np.ones(B, np.int32) if valid is None else np.asarray(valid, np.int32)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    qkv = normal(P, B + 1, kv * G + 2 * kv, _D)
    qkv[:, B:] = np.nan
    angles = 3 * normal(2, B, _D)  # of cos and of sin apart, both halves unequal
    keys, values = normal(2, B, kv, C, _D)
    stored = (np.arange(C) < lengths[:, None])[:, None, :, None]
    keys, values = np.where(stored, keys, np.nan), np.where(stored, values, 1e30)
    norms = 1 + normal(2, _D) / 8
    return Case(
        qkv=jnp.asarray(qkv),
        cos=jnp.asarray(np.cos(angles[0])),
        sin=jnp.asarray(np.sin(angles[1])),
        q_norm=jnp.asarray(norms[0], jnp.bfloat16),
        k_norm=jnp.asarray(norms[1], jnp.bfloat16),
        lengths=jnp.asarray(lengths),
        valid=jnp.asarray(valid),
        keys=jnp.asarray(keys, jnp.bfloat16),
        values=jnp.asarray(values, jnp.bfloat16),
    )


def one_row(case: Case, row: int) -> Case:
    """The case of that row alone."""
    by_row = {
        name: getattr(case, name)[row : row + 1]
        for name in ("cos", "sin", "lengths", "valid", "keys", "values")
    }
    return case._replace(qkv=case.qkv[:, row : row + 1], **by_row)


def assert_right(found: Sequence[jax.Array], case: Case) -> None:
    """The reference's: attended within a bound, caches bit for bit but for the new slots."""
    attended, *caches = (np.asarray(array.astype(jnp.float32)) for array in found)
    expected, *expected_caches = (
        np.asarray(array.astype(jnp.float32)) for array in _reference(*case)
    )
    assert found[0].dtype == jnp.bfloat16 and attended.shape == expected.shape
    for row, (some, others) in enumerate(zip(attended, expected, strict=True)):
        if not others.any():
            assert not some.any(), f"row {row} has no key, and its attention is not zero"
        else:
            error = np.linalg.norm(some - others) / np.linalg.norm(others)
            assert error < RELATIVE_BOUND, f"row {row}: relative error {error}"
    B, _, C, _ = case.keys.shape
    is_new = np.arange(C) == np.asarray(case.lengths % C)[:, None]
    is_new &= np.asarray(case.valid != 0)[:, None]
    for cache, expected_cache, before in zip(caches, expected_caches, case[-2:], strict=True):
        before = np.asarray(before.astype(jnp.float32))
        for row in range(B):
            old, new = ~is_new[row], is_new[row]
            np.testing.assert_array_equal(cache[row][:, old], before[row][:, old])
            # The order of a sum may move a value over the edge between two bf16.
            np.testing.assert_allclose(
                cache[row][:, new], expected_cache[row][:, new], rtol=2**-7, atol=1e-6
            )
