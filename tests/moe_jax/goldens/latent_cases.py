"""The cases of latent and shared experts: one MoE block each. Standard library only, as cases.py.

The width H of the model and L of the latent are narrow (L < H), wide (L > H), equal or there is no
latent; with each, shared experts or none, and a routing that was drawn or that the router made.
Where L is H every wrong order of the projections runs, so only these numbers can tell.
"""

import dataclasses

B = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentCase:
    """One block, its input, and what to record.

    Attributes:
      H, L: the widths of the model and of what the experts read; L is None without a latent.
      I, N: the widths within an expert and within the shared experts; N is None without them.
      E, K: experts, and how many a token goes to.
      S: tokens in each of B rows.
      routed: the router chooses, reading all of H; else experts and weights are drawn, the weights
        not adding up to 1 and one id being E, which is no expert.
      gradients: also record those of sum(y * cotangent).
    """

    name: str
    H: int
    L: int | None
    I: int = 10
    N: int | None
    E: int = 6
    K: int = 2
    S: int = 5
    routed: bool
    gradients: bool

    @property
    def config(self) -> dict:
        """Keys that replace those of cases.BASE; the last two are ours, Qwen3-MoE has none."""
        return {
            "hidden_size": self.H,
            "moe_intermediate_size": self.I,
            "num_experts": self.E,
            "num_experts_per_tok": self.K,
            "moe_latent_size": self.L,
            "moe_shared_expert_intermediate_size": self.N,
        }

    @property
    def shapes(self) -> dict[str, tuple]:
        """Shapes of the block's parameters, by moe_jax's names within it."""
        H, I, E, N = self.H, self.I, self.E, self.N
        width = self.L or H
        found = {"experts.gate_up": (E, 2, I, width), "experts.down": (E, width, I)}
        if self.routed:
            found["gate.weight"] = (E, H)
        if self.L:
            found["fc1_latent_proj.weight"] = (width, H)
            found["fc2_latent_proj.weight"] = (H, width)
        if N:
            found["shared_experts.gate_proj.weight"] = (N, H)
            found["shared_experts.up_proj.weight"] = (N, H)
            found["shared_experts.down_proj.weight"] = (H, N)
        return found


WIDTHS = {"narrow": (12, 8), "wide": (8, 12), "equal": (12, 12), "off": (12, None)}


def _cases():
    for widths, (H, L) in WIDTHS.items():
        for shared in (True, False):
            for routed in (True, False):
                yield LatentCase(
                    name=f"{widths}{'_shared' * shared}{'_routed' * routed}",
                    H=H,
                    L=L,
                    N=14 if shared else None,
                    routed=routed,
                    gradients=shared,
                )
    # T * K < E: what chooses its algorithm by the shapes takes the other one
    for routed in (True, False):
        yield LatentCase(
            name=f"few_tokens_shared{'_routed' * routed}",
            H=12,
            L=8,
            N=14,
            S=1,
            routed=routed,
            gradients=False,
        )


LATENT_CASES = {case.name: case for case in _cases()}
