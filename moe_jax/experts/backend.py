"""What a backend of the experts is, what it declares that it can do, and what one may ask of it."""

import dataclasses
from collections.abc import Callable, Mapping

import jax

PHASES = ("prefill", "decode", "training")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """One call of the experts, as far as it matters for which backend can run it.

    Attributes:
      platform: as moe_jax.platforms.resolve_platform returns it.
      phase: one of PHASES. Training needs gradients.
      T, K, E: tokens, experts of each, experts in all.
      width: what the experts take: H, or L with latent projections.
      I: the experts' intermediate size.
      dtype: of x, as "bfloat16".
      activation: a name in moe_jax.activations.ACTIVATIONS.
      latent: whether there are latent projections.
      shared: whether there are shared experts.
      quantised: whether the experts' weights have scales.
    """

    platform: str
    phase: str
    T: int
    K: int
    E: int
    width: int
    I: int
    dtype: str = "bfloat16"
    activation: str = "silu"
    latent: bool = False
    shared: bool = False
    quantised: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute a layer's experts.

    Attributes:
      run: run(x, weights, ids, expert_weights, *, activation, fc1_latent_proj, fc2_latent_proj,
        shared_experts) -> [T, H] in x's dtype; shapes as in moe_jax.experts.experts, and the last
        three may be None. An id outside [0, E) is padding, entry by entry.
      what: what it is, in one line.
      rel_error: dtype -> bound of ||y - reference|| / ||reference|| with every feature below, for
        weights and inputs of the size that a trained model has.
      platforms: where it runs, or None for everywhere.
      phases: those it is for.
      activations: those it has, or None for all.
      size_multiple: what the width and I must be multiples of.
      latent, shared, quantised, gradients: whether it has them.
    """

    run: Callable[..., jax.Array]
    what: str
    rel_error: Mapping[str, float]
    platforms: tuple[str, ...] | None = None
    phases: tuple[str, ...] = PHASES
    activations: tuple[str, ...] | None = None
    size_multiple: int = 1
    latent: bool = True
    shared: bool = True
    quantised: bool = False
    gradients: bool = True

    def lacks(self, asked: Asked) -> str | None:
        """What of this the backend cannot do, in words; None if it can do all."""
        if self.platforms is not None and asked.platform not in self.platforms:
            return f"platform {asked.platform!r} (it runs on {', '.join(self.platforms)})"
        if asked.phase not in self.phases:
            return f"phase {asked.phase!r} (it is for {', '.join(self.phases)})"
        if asked.phase == "training" and not self.gradients:
            return "gradients"
        if self.activations is not None and asked.activation not in self.activations:
            return f"activation {asked.activation!r} (it has {', '.join(self.activations)})"
        if asked.dtype not in self.rel_error:
            return f"dtype {asked.dtype} (it takes {', '.join(self.rel_error)})"
        sizes = (asked.width, asked.I)
        if any(size % self.size_multiple for size in sizes):
            letter = "L" if asked.latent else "H"
            return f"{letter}, I = {sizes} (it takes multiples of {self.size_multiple})"
        for name, words in (
            ("latent", "latent projections"),
            ("shared", "shared experts"),
            ("quantised", "quantised weights"),
        ):
            if getattr(asked, name) and not getattr(self, name):
                return words
        return None
