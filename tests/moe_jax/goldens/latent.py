"""transformers' NemotronHMoE with Qwen3-MoE's parts: the oracle of latent and shared experts.

The block's own forward pass sets the order of operations; experts, router and shared experts are
replaced, as its own are not gated and its router is another. The routed_scaling_factor of its
config belongs to that router, so nothing here is scaled.
"""

import draw
import numpy as np
import oracle
import torch
from cases import BASE, replace_keys
from latent_cases import B, LatentCase
from transformers import NemotronHConfig, Qwen3MoeConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

# The least standard deviation of a part of the output: one that is missing must show.
VISIBLE = 0.1


class DrawnRouting(torch.nn.Module):
    """In place of a router: always these ids and weights, [T, K]."""

    def __init__(self, ids: torch.Tensor, weights: torch.Tensor):
        super().__init__()
        self.ids, self.weights = ids, weights

    def forward(self, x: torch.Tensor) -> tuple:
        """Nothing in place of router logits, then weights and ids: Qwen3-MoE's order too."""
        return None, self.weights, self.ids


class NoSharedExperts(torch.nn.Module):
    """NemotronHMoE always has shared experts: these add nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zeros like x."""
        return torch.zeros_like(x)


def expected(case: LatentCase, seed: int, attempt: int) -> dict[str, torch.Tensor]:
    """The case's file: weights.NAME, inputs.NAME, routing.NAME, outputs.NAME, gradients.NAME.

    Raises:
      oracle.DrawAgain: the router's choice is too close to call.
    """
    weights = {
        name: torch.from_numpy(draw.weight(f"mlp.{name}", shape, seed)).requires_grad_()
        for name, shape in case.shapes.items()
    }
    drawn = {name: torch.from_numpy(value) for name, value in inputs(case, seed, attempt).items()}
    x, wanted = drawn["x"].requires_grad_(), {}
    if not case.routed:
        wanted["routing.weights"] = drawn["weights"].requires_grad_()
    parts = forward(case, weights, x, DrawnRouting(drawn["ids"], drawn["weights"]))
    logits, routing_weights, ids = parts["gate"]
    if case.routed:
        _no_ties(logits, case)
    y = parts["y"]
    for part, there in (
        (y - parts["shared_experts"], True),
        (parts["shared_experts"], case.N is not None),
    ):
        assert (part.std() > VISIBLE) == there, f"a part has a standard deviation of {part.std()}"

    found = {f"weights.{name}": weight.half() for name, weight in weights.items()}
    found |= {"inputs.x": x, "routing.ids": ids.int(), "routing.weights": routing_weights}
    found["outputs.y"] = y
    if case.gradients:
        wanted |= weights | {"x": x}
        found["inputs.cotangent"] = drawn["cotangent"]
        gradients = torch.autograd.grad((y * drawn["cotangent"]).sum(), list(wanted.values()))
        found |= {f"gradients.{n}": g for n, g in zip(wanted, gradients, strict=True)}
    for name, value in found.items():
        assert value.isfinite().all(), f"{name} is not finite"
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def inputs(case: LatentCase, seed: int, attempt: int) -> dict[str, np.ndarray]:
    """Draws x and cotangent [B, S, H] and, should it be wanted, ids and weights [T, K]."""
    rng = draw.generator(seed, "latent", case.name, attempt)
    x, cotangent = rng.normal(0, 1, (2, B, case.S, case.H)).astype(np.float16).astype(np.float32)
    T = B * case.S
    ids = rng.permuted(np.tile(np.arange(case.E), (T, 1)), axis=1)[:, : case.K]
    ids[0, -1] = case.E
    weights = rng.uniform(0.2, 1.0, (T, case.K)).astype(np.float32)
    return {"x": x, "cotangent": cotangent, "ids": ids, "weights": weights}


def forward(case: LatentCase, weights: dict, x: torch.Tensor, routing: DrawnRouting) -> dict:
    """The block's output y [B, S, H], and what its `gate` and `shared_experts` returned."""
    block = _block(case, routing)
    named = {_RENAMED.get(name, name): weight for name, weight in weights.items()}
    named["experts.gate_up_proj"] = named["experts.gate_up_proj"].flatten(1, 2)  # gate rows first
    theirs = {name for name, _ in block.named_parameters()}
    if named.keys() != theirs:
        raise ValueError(f"the block's parameters are {theirs}; drawn were {set(named)}")
    parts = {}
    for name in ("gate", "shared_experts"):
        block.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: parts.update({name: out})
        )
    # unlike load_state_dict it keeps our tensors in the graph: gradients come in our shapes
    parts["y"] = torch.func.functional_call(block, named, (x,), strict=True)
    return parts


# moe_jax's names of parameters to those of the replaced block
_RENAMED = {"experts.gate_up": "experts.gate_up_proj", "experts.down": "experts.down_proj"}


def _block(case: LatentCase, routing: DrawnRouting) -> NemotronHMoE:
    """The block with its parts replaced, and parameters that are nothing yet."""
    block = NemotronHMoE(
        NemotronHConfig(
            hidden_size=case.H,
            moe_latent_size=case.L,
            n_routed_experts=case.E,
            num_experts_per_tok=case.K,
            moe_intermediate_size=case.I,
            moe_shared_expert_intermediate_size=case.N or 1,
            routed_scaling_factor=1.0,
        )
    )
    full, latent = (_qwen3_config(case, width) for width in (case.H, case.L or case.H))
    block.experts = qwen3_moe.Qwen3MoeExperts(latent)
    block.gate = qwen3_moe.Qwen3MoeTopKRouter(full) if case.routed else routing
    if case.N:
        block.shared_experts = qwen3_moe.Qwen3MoeMLP(full, intermediate_size=case.N)
    else:
        block.shared_experts = NoSharedExperts()
    return block


def _qwen3_config(case: LatentCase, width: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **replace_keys(BASE, case.config | {"hidden_size": width}),
        experts_implementation=oracle.PLAIN["experts_implementation"],
    )


def _no_ties(logits: torch.Tensor, case: LatentCase) -> None:
    """Raises oracle.DrawAgain unless the order of the first K + 1 experts is clear."""
    ordered = logits.softmax(-1).sort(-1, descending=True).values
    if (ordered[:, : case.K] - ordered[:, 1 : case.K + 1]).min() < oracle.TIE_OF_PROBABILITIES:
        raise oracle.DrawAgain("two router probabilities are too close")
