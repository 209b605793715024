"""Which backend "auto" takes: a table of rules, read from the top."""

from collections.abc import Mapping
from typing import NamedTuple

from moe_jax.experts.backend import PHASES, Asked, Backend


class Rule(NamedTuple):
    """One line of the table.

    Attributes:
      platforms: where it applies; () is everywhere.
      phases: when it applies.
      most_tokens: the most tokens it applies to; None is any number.
      backend: what is taken, unless it lacks something that is asked for.
      why: the reason.
    """

    platforms: tuple[str, ...]
    phases: tuple[str, ...]
    most_tokens: int | None
    backend: str
    why: str

    def passes_over(self, asked: Asked) -> str | None:
        """Why the rule does not apply; None if it does."""
        if self.platforms and asked.platform not in self.platforms:
            return f"for {', '.join(self.platforms)}"
        if asked.phase not in self.phases:
            return f"for {', '.join(self.phases)}"
        if self.most_tokens is None or self.most_tokens >= asked.T:
            return None
        return f"for T <= {self.most_tokens}"


RULES: tuple[Rule, ...] = (
    Rule(
        ("cuda",),
        ("prefill", "decode"),
        2048,
        "pallas",
        "the decode kernels read each expert as few times as they can; faster than plain XLA up to "
        "T = 2048, as measured on an H100",
    ),
    Rule(
        (),
        PHASES,
        None,
        "portable",
        "plain XLA that any compiler takes; gathers if T * K < E, else multiplies all experts",
    ),
)


class BackendChoice(NamedTuple):
    """A backend's name, and why it was taken, the rules passed over included."""

    backend: str
    why: str


def choose_backend(asked: Asked, backends: Mapping[str, Backend]) -> BackendChoice:
    """Says which backend `backend="auto"` runs.

    Raises:
      NotImplementedError: no rule's backend can do it.
    """
    lacking = []
    for rule in RULES:
        if rule.passes_over(asked) is not None:
            continue
        lack = backends[rule.backend].lacks(asked)
        if lack is None:
            return BackendChoice(rule.backend, "; ".join([*lacking, rule.why]))
        lacking.append(f"{rule.backend} lacks {lack}")
    raise NotImplementedError(f"no experts backend can do this: {'; '.join(lacking)}")
