"""What experiments.generate shows: the text while it is made, then the figures."""

import unicodedata
from collections.abc import Iterator
from typing import TextIO

import flax
import jax

from experiments.bench.environment import checked_out_commit
from moe_jax.generation import Event, Generation


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
        "\N{REPLACEMENT CHARACTER}"
        if character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs")
        else character
        for character in text
    )


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
