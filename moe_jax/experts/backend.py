"""What a backend of the experts is, and what it declares that it can do."""

import dataclasses
from collections.abc import Callable

import jax

from pallas_kernels.decode_experts import ExpertWeights

# (x [T, H], weights, ids [T, K], expert_weights [T, K], activation) -> [T, H] in x's dtype.
# An id outside [0, E) is padding, entry by entry.
Run = Callable[[jax.Array, ExpertWeights, jax.Array, jax.Array, str], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute a layer's experts.

    Attributes:
      run: the function.
      what: what it is, in one line.
      activations: those it has, or None for all.
      dtypes: of x and of the weights; None for every float dtype.
      size_multiple: what H and I must be multiples of.
      gradients: whether it has any.
      platforms: where it runs, or None for everywhere.
    """

    run: Run
    what: str
    activations: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    size_multiple: int = 1
    gradients: bool = True
    platforms: tuple[str, ...] | None = None

    def lacks(
        self, *, activation: str, dtype: str, sizes: tuple[int, ...], platform: str
    ) -> str | None:
        """What of this the backend cannot do, in words; None if it can do all."""
        if self.platforms is not None and platform not in self.platforms:
            return f"platform {platform!r} (it runs on {', '.join(self.platforms)})"
        if self.activations is not None and activation not in self.activations:
            return f"activation {activation!r} (it has {', '.join(self.activations)})"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"dtype {dtype} (it takes {', '.join(self.dtypes)})"
        if any(size % self.size_multiple for size in sizes):
            return f"H, I = {sizes} (it takes multiples of {self.size_multiple})"
        return None
