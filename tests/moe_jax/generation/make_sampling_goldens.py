"""Makes sampling_goldens.npz: what transformers' logits processors do to a few rows of logits.

    python tests/moe_jax/generation/make_sampling_goldens.py

Needs torch and transformers, and nothing of this project; the tests read only the file.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from transformers.generation import logits_process as hf

CASES = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "repetition_reward": {"repetition_penalty": 0.7},
    "temperature": {"temperature": 0.6},
    "top_k_1": {"temperature": 1.0, "top_k": 1},
    "top_k_5": {"temperature": 1.0, "top_k": 5},
    "top_k_above_vocab": {"temperature": 1.0, "top_k": 1000},
    "top_p_0": {"temperature": 1.0, "top_p": 0.0},
    "top_p_0.3": {"temperature": 1.0, "top_p": 0.3},
    "top_p_0.8": {"temperature": 1.0, "top_p": 0.8},
    "top_p_0.99": {"temperature": 1.0, "top_p": 0.99},
    "min_p_0.05": {"temperature": 1.0, "min_p": 0.05},
    "min_p_1": {"temperature": 1.0, "min_p": 1.0},
    "top_k_and_top_p": {"temperature": 1.0, "top_k": 7, "top_p": 0.8},
    "qwen3": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "all": {
        "temperature": 0.7,
        "top_k": 12,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
    },
}


def logits() -> np.ndarray:
    """[B, V] float32: flat, peaked and ordinary rows, rows with ties, one with -inf."""
    random = np.random.default_rng(0)
    V = 64
    rows = [random.normal(0, scale, V) for scale in (0.1, 1.0, 3.0, 8.0)]
    rows.append(np.round(random.normal(0, 2, V)))  # many ties, as bfloat16 logits have
    rows.append(np.zeros(V))  # nothing but ties
    with_infinite = random.normal(0, 2, V)
    with_infinite[::3] = -np.inf
    rows.append(with_infinite)
    return np.stack(rows).astype(np.float32)


def processed(scores: torch.Tensor, ids: torch.Tensor, case: dict) -> torch.Tensor:
    """The processors in the order in which transformers puts them."""
    if "repetition_penalty" in case:
        scores = hf.RepetitionPenaltyLogitsProcessor(case["repetition_penalty"])(ids, scores)
    if case.get("temperature", 1.0) != 1.0:
        scores = hf.TemperatureLogitsWarper(case["temperature"])(ids, scores)
    if "top_k" in case:
        scores = hf.TopKLogitsWarper(case["top_k"])(ids, scores)
    if "top_p" in case:
        scores = hf.TopPLogitsWarper(case["top_p"])(ids, scores)
    if "min_p" in case:
        scores = hf.MinPLogitsWarper(case["min_p"])(ids, scores)
    return scores


def main() -> None:
    """Writes the file beside this script."""
    rows = logits()
    ids = np.random.default_rng(1).integers(0, rows.shape[1], (rows.shape[0], 10))
    arrays = {
        name: processed(torch.tensor(rows), torch.tensor(ids), case).numpy()
        for name, case in CASES.items()
    }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    np.savez_compressed(
        pathlib.Path(__file__).with_name("sampling_goldens.npz"),
        _logits=rows,
        _ids=ids,
        _cases=json.dumps(CASES),
        _versions=json.dumps(versions),
        **arrays,
    )


if __name__ == "__main__":
    main()
