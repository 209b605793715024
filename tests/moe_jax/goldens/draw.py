"""Random weights and inputs of a case, by numpy alone, so that a seed means the same everywhere."""

import zlib

import numpy as np
from cases import Case

PADDING = 4  # columns of padding in a padded row
IGNORED = -100  # a label that does not count
GAP = slice(4, 4 + PADDING)
STARTS = ((0, 4), (0, 3, 9))  # the columns where a packed row's sequences begin


def weight(name: str, shape: tuple, seed: int) -> np.ndarray:
    """A tensor of a checkpoint, under its hub key: float32 on float16's grid, so stored exactly.

    The same name, shape and seed give the same tensor, whatever the case. Nothing is at the scale
    that a fresh model has: norms are not 1, biases not 0, routers are decided.
    """
    rng = generator(seed, name, *shape)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        values = rng.uniform(0.7, 1.8, shape)  # attention is decided too
    elif name.endswith("norm.weight"):
        values = rng.uniform(0.5, 1.5, shape)
    elif name.endswith(".bias"):
        values = rng.normal(0, 0.3, shape)
    elif name.endswith("embed_tokens.weight"):
        values = rng.normal(0, 1, shape)
    else:
        gain = 1.5 if "mlp" in name else 1.0
        values = rng.normal(0, gain * shape[-1] ** -0.5, shape)
    return values.astype(np.float16).astype(np.float32)


def inputs(case: Case, seed: int, attempt: int) -> dict[str, np.ndarray]:
    """What the forward pass is given: input_ids or inputs_embeds, and what else the case has."""
    rng = generator(seed, case.name, attempt)
    config, B, S = case.config_json, 2, case.length
    ids = rng.integers(1, config["vocab_size"], (B, S)).astype(np.int32)
    mask = attention_mask(case.padding, B, S)
    found = {"input_ids": np.where(mask == 1, ids, 0)}
    if case.embeds:
        embeds = rng.normal(0, 1, (B, S, config["hidden_size"]))
        found = {"inputs_embeds": embeds.astype(np.float16).astype(np.float32)}
    if case.padding:
        found["attention_mask"] = mask
    if case.positions == "offset":
        found["position_ids"] = np.arange(S, dtype=np.int32) + np.array([[3], [17]], np.int32)
    if case.positions == "jumps":
        found["position_ids"] = np.sort(rng.permuted(np.tile(np.arange(40), (B, 1)), axis=1)[:, :S])
        found["position_ids"] = found["position_ids"].astype(np.int32)
    if case.positions == "packed":
        columns = np.arange(S, dtype=np.int32)
        begun = [max(start for start in row if start <= c) for row in STARTS for c in columns]
        found["position_ids"] = columns - np.array(begun, np.int32).reshape(B, S)
    if case.labels:
        found["labels"] = _labels(rng, ids, mask)
    if case.labels and case.positions == "packed":
        # The sequence before would have to predict these; transformers leaves that to the labels.
        found["labels"] = np.where(found["position_ids"] == 0, IGNORED, found["labels"])
    if isinstance(case.keep, tuple):
        found["logits_to_keep"] = np.array(case.keep, np.int32)
    return found


def attention_mask(padding: str, B: int, S: int) -> np.ndarray:
    """[B, S] int32, 1 where a token is valid."""
    mask = np.ones((B, S), np.int32)
    if padding == "left":
        mask[1, :PADDING] = 0
    elif padding == "right":
        mask[1, -PADDING:] = 0
    elif padding == "both":
        mask[0, -PADDING:] = 0
        mask[1, :PADDING] = 0
    elif padding == "gap":
        mask[1, GAP] = 0
    elif padding:
        raise ValueError(f"padding is {padding!r}; expected left, right, both or gap")
    return mask


def _labels(rng: np.random.Generator, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The ids, but nothing that padding would be, or would have to predict; two others ignored."""
    predicted_by_valid = np.pad(mask[:, :-1], ((0, 0), (1, 0)))
    labels = np.where((mask == 1) & (predicted_by_valid == 1), ids, IGNORED)
    for row in labels:
        row[rng.choice(np.flatnonzero(row != IGNORED), 2, replace=False)] = IGNORED
    return labels.astype(np.int32)


def generator(seed: int, *what) -> np.random.Generator:
    """Random numbers that are this thing's own, whatever else is drawn."""
    return np.random.default_rng([seed, zlib.crc32(repr(what).encode())])
