"""`generate`: everything at once, with the times that it took."""

import dataclasses
from collections.abc import Iterable, Sequence

from moe_jax.generation.logprobs import TokenLogprobs
from moe_jax.generation.sampling import Sampling
from moe_jax.generation.streaming import GREEDY, Event, stream
from moe_jax.model import Qwen3Moe
from moe_jax.traces import RoutingTrace, join_traces


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What was generated, for each prompt in turn.

    Attributes:
      tokens: the new tokens; a row that a stop id ended has it as its last.
      texts: their text, without stop ids and stop strings; empty without a tokenizer.
      finish_reasons: "stop_id", "stop_string" or "length".
      first_token_seconds: from the start to the first token: prefill, and in the first call of
        these shapes the compiling of prefill and decode step.
      decode_seconds: from the first token to the last; a group of tokens comes at once, see
        steps_per_dispatch of `stream`.
      decode_steps: steps in that time; tokens_per_second counts the tokens of all rows in them.
      trace: of the decode steps one after the other, each with all B rows; None if not captured.
      logprobs: of `tokens`, one for each; None if they were not asked for.
    """

    tokens: list[list[int]]
    texts: list[str]
    finish_reasons: list[str]
    first_token_seconds: float
    decode_seconds: float
    decode_steps: int
    trace: RoutingTrace | None = None
    logprobs: list[list[TokenLogprobs]] | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the decode steps; None where there was none."""
        if self.decode_steps == 0:
            return None
        return (sum(map(len, self.tokens)) - len(self.tokens)) / self.decode_seconds


def collect(events: Iterable[Event], B: int) -> Generation:
    """Adds up the events of B rows."""
    tokens: list[list[int]] = [[] for _ in range(B)]
    logprobs: list[list[TokenLogprobs]] = [[] for _ in range(B)]
    texts = [""] * B
    reasons = [""] * B
    first = last = 0.0
    steps = 0
    for event in events:
        tokens[event.row].append(event.token_id)
        if event.logprobs is not None:
            logprobs[event.row].append(event.logprobs)
        texts[event.row] += event.text
        reasons[event.row] = event.finish_reason or ""
        if event.index == 0:
            first = event.seconds
        last, steps = event.seconds, event.index
    return Generation(
        tokens=tokens,
        texts=texts,
        finish_reasons=reasons,
        first_token_seconds=first,
        decode_seconds=last - first,
        decode_steps=steps,
        logprobs=logprobs if any(logprobs) else None,
    )


class TraceRecorder:
    """An `on_routing` of `stream` that keeps what it is given."""

    def __init__(self):
        self._steps: list[RoutingTrace] = []

    def __call__(self, trace: RoutingTrace) -> None:
        self._steps.append(trace)

    def trace(self) -> RoutingTrace:
        """All steps as one [MoE layers, steps * B, K].

        Raises:
          ValueError: there was no decode step, as with one new token, which prefill makes.
        """
        if not self._steps:
            raise ValueError("there was no decode step to trace; expected two new tokens or more")
        return join_traces(self._steps)


def generate(
    model: Qwen3Moe,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling = GREEDY,
    max_new_tokens: int,
    capture: bool = False,
    **options,
) -> Generation:
    """Generates for every prompt.

    Args:
      model, prompts, sampling, max_new_tokens: as in `stream`.
      capture: whether to return which experts the decode steps chose.
      options: the other arguments of `stream`, logprobs among them.

    Raises:
      ValueError, TypeError, FloatingPointError: as `stream` does; ValueError too for a capture
        without any decode step, or besides on_routing.
    """
    recorder = TraceRecorder()
    if capture and options.get("on_routing") is not None:
        raise ValueError("capture and on_routing are both given; expected one of the two")
    if capture:
        options["on_routing"] = recorder
    events = stream(model, prompts, sampling=sampling, max_new_tokens=max_new_tokens, **options)
    made = collect(events, len(prompts))
    return dataclasses.replace(made, trace=recorder.trace()) if capture else made
