"""transformers' Qwen3MoeForCausalLM: the model of a case, and what comes out of it."""

import contextlib
import json
import pathlib
import tempfile

import numpy as np
import torch
from cases import Case
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()
torch.set_num_threads(1)  # or a sum's order depends on the machine

# What is nearer than this is too close to call.
TIE_OF_PROBABILITIES = 1e-4
TIE_OF_LOGITS = 1e-3
FEWEST_TOKENS = 6  # different ones, in what is generated
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}


class DrawAgain(Exception):
    """These inputs show too little, or a choice of an expert or a token is too close to call."""


def shapes(config_json: dict) -> dict[str, tuple]:
    """Shapes by hub key, as save_pretrained writes a fresh model of this config."""
    fields = {key: value for key, value in config_json.items() if key != "quantization_config"}
    with tempfile.TemporaryDirectory() as folder:
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields)).save_pretrained(folder)
        tensors = load_file(pathlib.Path(folder, "model.safetensors"))
    return {key: tuple(tensor.shape) for key, tensor in sorted(tensors.items())}


def model_of(config_json: dict, tensors: dict[str, torch.Tensor]) -> Qwen3MoeForCausalLM:
    """The model of a checkpoint directory with these two files; `tensors` are not quantised."""
    fields = {key: value for key, value in config_json.items() if key != "quantization_config"}
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "config.json").write_text(json.dumps(fields))
        save_file(tensors, pathlib.Path(folder, "model.safetensors"), metadata={"format": "pt"})
        return load(folder)


def load(directory: str | pathlib.Path) -> Qwen3MoeForCausalLM:
    """What from_pretrained makes of a checkpoint directory, in float32.

    Raises:
      ValueError: it found other tensors than it wanted.
    """
    model, report = Qwen3MoeForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **PLAIN
    )
    if any(report.values()):
        raise ValueError(f"from_pretrained reports {report}")
    return model.eval()


def forward(model: Qwen3MoeForCausalLM, case: Case, inputs: dict) -> dict[str, torch.Tensor]:
    """One pass without a cache: logits, hidden_states.N, router_logits.N, loss, aux_loss.

    Raises:
      DrawAgain: a valid token's choice of experts is too close to call.
    """
    arguments = _arguments(case, inputs)
    _fresh_frequencies(model)
    with _no_ties(model, arguments.get("attention_mask")):
        out = model(
            **arguments,
            output_hidden_states=True,
            output_router_logits=case.router_logits,
            use_cache=False,
        )
    found = {"logits": out.logits}
    found |= {f"hidden_states.{i}": state for i, state in enumerate(out.hidden_states)}
    for i, logits in enumerate(out.router_logits or ()):
        found[f"router_logits.{i}"] = logits
    for name in ("loss", "aux_loss"):
        if getattr(out, name) is not None:
            found[name] = getattr(out, name)
    return found


def gradients(model: Qwen3MoeForCausalLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss's gradients to routers and experts, under transformers' stacked names."""
    wanted = {name: p for name, p in model.named_parameters() if ".mlp." in name}
    found = torch.autograd.grad(loss, list(wanted.values()), retain_graph=True)
    return {f"gradients.{name}": gradient for name, gradient in zip(wanted, found, strict=True)}


@torch.no_grad()
def cached(model: Qwen3MoeForCausalLM, case: Case, inputs: dict, chunks: tuple) -> torch.Tensor:
    """Logits of passes over consecutive columns, with transformers' own cache between them.

    Raises:
      DrawAgain: as in `forward`.
    """
    arguments = _arguments(case, inputs)
    B, S = arguments["input_ids"].shape
    mask = arguments.get("attention_mask", torch.ones(B, S, dtype=torch.long))
    positions = arguments.get("position_ids", torch.arange(S)[None])
    cache, logits, start = DynamicCache(config=model.config), [], 0
    _fresh_frequencies(model)
    for length in chunks:
        columns = slice(start, start + length)
        with _no_ties(model, mask[:, columns]):
            out = model(
                input_ids=arguments["input_ids"][:, columns],
                attention_mask=mask[:, : columns.stop],
                position_ids=positions[:, columns],
                past_key_values=cache,
                use_cache=True,
            )
        logits.append(out.logits)
        start += length
    if start != S:
        raise ValueError(f"{case.name}: chunks {chunks} add up to {start}; expected {S}")
    return torch.cat(logits, dim=1)


@torch.no_grad()
def generate(model: Qwen3MoeForCausalLM, case: Case, inputs: dict) -> dict[str, torch.Tensor]:
    """Greedily generated tokens [B, N], and the logits [B, N, V] that they are the largest of.

    Raises:
      DrawAgain: as in `forward`; two logits are too close; or always the same few tokens came.
    """
    arguments = {
        name: torch.from_numpy(value).long()
        for name, value in inputs.items()
        if name in ("input_ids", "attention_mask")
    }
    S = case.length
    arguments.setdefault("attention_mask", torch.ones_like(arguments["input_ids"]))
    _fresh_frequencies(model)
    out = model.generate(
        **arguments,
        do_sample=False,
        max_new_tokens=case.new_tokens,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens, logits = out.sequences[:, S:], torch.stack(out.logits, dim=1)
    best, second = logits.topk(2).values.unbind(-1)
    if (best - second).min() < TIE_OF_LOGITS:
        raise DrawAgain("two logits are too close")
    if len(tokens.unique()) < FEWEST_TOKENS:
        raise DrawAgain("always the same few tokens")
    return {"tokens": tokens, "token_logits": logits}


def _arguments(case: Case, inputs: dict) -> dict[str, torch.Tensor]:
    """The inputs as transformers takes them, its defaults for padded rows made explicit."""
    found = {
        name: torch.from_numpy(value if value.dtype == np.float32 else value.astype(np.int64))
        for name, value in inputs.items()
    }
    if isinstance(case.keep, int) and case.keep:
        found["logits_to_keep"] = case.keep
    if "attention_mask" in found and "position_ids" not in found:
        # what generate() does; forward() alone would count the padding
        found["position_ids"] = (found["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if case.positions == "jumps":
        # without a mask, positions that jump are taken for several packed sequences
        found["attention_mask"] = torch.ones_like(found["position_ids"])
    return found


def _fresh_frequencies(model: Qwen3MoeForCausalLM) -> None:
    """A dynamic RoPE remembers the longest sequence it has seen, and turns later ones by it."""
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(model.config)


@contextlib.contextmanager
def _no_ties(model: Qwen3MoeForCausalLM, mask: torch.Tensor | None):
    """Looks at every router's output while the body runs; raises DrawAgain at its end."""
    recorded = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, args, out: recorded.append(out[0]))
        for layer in model.model.layers
        if hasattr(layer.mlp, "gate")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    K, E = model.config.num_experts_per_tok, model.config.num_experts
    for logits in recorded if K < E else ():
        valid = logits if mask is None else logits[mask.reshape(-1) == 1]
        ordered = valid.softmax(-1).sort(-1, descending=True).values
        if len(valid) and (ordered[:, K - 1] - ordered[:, K]).min() < TIE_OF_PROBABILITIES:
            raise DrawAgain("two router probabilities are too close")
