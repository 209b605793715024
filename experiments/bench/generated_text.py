"""What experiments.generate shows: the text while it is made, then the figures."""

import unicodedata
from collections.abc import Iterator
from typing import TextIO

import flax
import jax

from experiments.bench.environment import checked_out_commit
from moe_jax.generation import Event, Generation

_REPLACED = "\N{REPLACEMENT CHARACTER}"


def show_text(events: Iterator[Event], B: int, out: TextIO) -> Iterator[Event]:
    """Passes events on and writes their text: row 0 as it comes, the others when all is done."""
    others = [""] * B
    if B > 1:
        out.write("--- row 0\n")
    for event in events:
        if event.row == 0:
            out.write(printable(event.text))
            out.flush()
        else:
            others[event.row] += event.text
        yield event
    for row in range(1, B):
        out.write(f"\n--- row {row}\n{printable(others[row])}")
    out.write("\n")


def printable(text: str) -> str:
    """The text without what would steer a terminal: a random model writes escape codes too."""
    return "".join(
        _REPLACED
        if character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs")
        else character
        for character in text
    )


def logprobs_report(made: Generation, tokenizer) -> str:
    """A line for each token: number, log-probability, token; then the likeliest tokens there.

    Tokens are shown as text; as ids without a tokenizer, or where they have no text of their own.
    Empty where no log-probabilities were asked for.
    """
    if made.logprobs is None:
        return ""

    def shown(token: int) -> str:
        text = "" if tokenizer is None else tokenizer.decode([token])
        return repr(text) if text and _REPLACED not in printable(text) else str(token)

    lines = ["", "log-probabilities of the model, before temperature and filters"]
    for row, found in enumerate(made.logprobs):
        lines += [f"--- row {row}"] if len(made.logprobs) > 1 else []
        for place, (token, each) in enumerate(zip(made.tokens[row], found, strict=True)):
            top = "  ".join(f"{shown(other)} {value:.4f}" for other, value in each.top)
            lines.append(f"{place:>5} {each.chosen:9.4f}  {shown(token):<16} {top}".rstrip())
    return "\n".join(lines) + "\n"


def report(made: Generation, prompts: list[list[int]], warm_up_seconds: float | None) -> str:
    """The figures, a line each."""
    lengths = [len(prompt) for prompt in prompts]
    span = str(lengths[0]) if len(set(lengths)) == 1 else f"{min(lengths)} to {max(lengths)}"
    compiled = "compiling included" if warm_up_seconds is None else "compiled before"
    lines = [
        f"rows: {len(prompts)}, prompt tokens: {span}, new tokens: {sum(map(len, made.tokens))} "
        f"({_count(made.finish_reasons)})",
        f"time to first token: {made.first_token_seconds * 1e3:.1f} ms, {compiled}",
    ]
    if made.decode_steps:
        step = made.decode_seconds / made.decode_steps
        lines.append(
            f"decode: {made.tokens_per_second:.1f} tokens/s, {made.decode_steps} steps of "
            f"{step * 1e3:.2f} ms"
        )
    if warm_up_seconds is not None:
        lines.append(f"compiling and warming up: {warm_up_seconds:.1f} s")
    device = jax.devices()[0].device_kind
    versions = f"jax {jax.__version__}, flax {flax.__version__}"
    commit, *changed = (checked_out_commit() or "unknown").split("-")
    lines.append(f"{device}, {versions}, commit {'-'.join([commit[:12], *changed])}")
    return "\n".join(lines)


def _count(reasons: list[str]) -> str:
    return ", ".join(f"{reason} {reasons.count(reason)}" for reason in sorted(set(reasons)))
