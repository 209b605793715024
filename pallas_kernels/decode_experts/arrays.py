"""One error for an array argument that is not what was asked for."""

import jax.numpy as jnp
import numpy as np


def expect_array(
    name: str, value, letters: str, dtype, *, instead: str = "reference_experts"
) -> None:
    """Checks an argument's own shape and dtype, before JAX would convert anything.

    Args:
      name: the argument, as the caller knows it.
      value: a jax or numpy array.
      letters: its shape in letters, as "[T, K]"; every size is at least 1.
      dtype: what is accepted.
      instead: the function that takes any float dtype, for the message.

    Raises:
      TypeError: it is no array, or of another dtype.
      ValueError: it has another number of dimensions, or a size of 0.
      NotImplementedError: another float dtype where bfloat16 is taken.
    """
    dtype = np.dtype(dtype)
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        kind = type(value).__name__
        raise TypeError(f"{name} is a {kind}; expected a {dtype.name} array {letters}")
    if len(value.shape) != letters.count(",") + 1 or 0 in value.shape:
        raise ValueError(
            f"{name} has shape {value.shape}; expected {letters}, every size at least 1"
        )
    if value.dtype == dtype:
        return
    if dtype == jnp.bfloat16 and jnp.issubdtype(value.dtype, jnp.floating):
        raise NotImplementedError(
            f"{name} has dtype {value.dtype.name}; the kernels take bfloat16, "
            f"{instead} takes any float dtype"
        )
    raise TypeError(f"{name} has dtype {value.dtype.name}; expected {dtype.name}")
