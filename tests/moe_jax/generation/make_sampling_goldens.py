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


def token_ids() -> np.ndarray:
    """[B, 24], of few tokens, so that n-grams come again."""
    return np.random.default_rng(1).integers(0, 5, (7, 24))


# Words that some rows are about to complete, one that is longer than a row, one of a single token.
_ENDS = [row[-3:].tolist() for row in token_ids()]
WORDS = [
    [*_ENDS[0], 9],
    [*_ENDS[1][1:], 10],
    [_ENDS[2][2], 11],
    [_ENDS[3][2], 12],
    [1, *_ENDS[4], 13],
    [*range(5, 35), 14],
    [15],
]

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
    "no_repeat_1": {"no_repeat_ngram_size": 1},
    "no_repeat_2": {"no_repeat_ngram_size": 2},
    "no_repeat_3": {"no_repeat_ngram_size": 3},
    "no_repeat_whole_row": {"no_repeat_ngram_size": 24},
    "no_repeat_longer": {"no_repeat_ngram_size": 25},
    "bad_words": {"bad_words_ids": WORDS},
    "bad_word_alone": {"bad_words_ids": [[3], [63]]},
    "suppress": {"suppress_tokens": [0, 5, 5, 63]},
    "all": {
        "temperature": 0.7,
        "top_k": 12,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": WORDS,
        "suppress_tokens": [7, 40],
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
    if "no_repeat_ngram_size" in case:
        scores = hf.NoRepeatNGramLogitsProcessor(case["no_repeat_ngram_size"])(ids, scores)
    if "bad_words_ids" in case:
        scores = hf.NoBadWordsLogitsProcessor(case["bad_words_ids"])(ids, scores)
    if "suppress_tokens" in case:
        scores = hf.SuppressTokensLogitsProcessor(case["suppress_tokens"])(ids, scores)
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
    ids = token_ids()
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
