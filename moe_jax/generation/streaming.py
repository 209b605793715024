"""`stream`: tokens and text of every row, as an iterator, while they are made."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from moe_jax.config import Qwen3MoeConfig
from moe_jax.experts import EXPERTS_BACKENDS
from moe_jax.generation import arguments
from moe_jax.generation import decode as compiled
from moe_jax.generation.logits_processors import NO_TOKEN
from moe_jax.generation.logprobs import StepLogprobs, TokenLogprobs, of_token
from moe_jax.generation.sampling import Sampling, token_table
from moe_jax.generation.text import RowText
from moe_jax.model import Qwen3Moe
from moe_jax.parallelism import Parallelism
from moe_jax.parameters import to_arrays
from moe_jax.platforms import resolve_platform
from moe_jax.traces import RoutingTrace

GREEDY = Sampling()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """One token of one row.

    Attributes:
      row: which prompt.
      index: the token's number in its row, from 0.
      token_id: the token; a stop id too is reported.
      text: what may be shown now: characters and beginnings of stop strings are held back until
        they are complete, or clearly none. Neither stop strings nor stop ids are in it.
      finish_reason: None, or why the row ends with this token: "stop_id", "stop_string", "length".
      seconds: since `stream` began to run, when the token was there; the same for all tokens of a
        group, see steps_per_dispatch.
      logprobs: the token's log-probabilities; None if they were not asked for.
    """

    row: int
    index: int
    token_id: int
    text: str
    finish_reason: str | None
    seconds: float
    logprobs: TokenLogprobs | None = None


_PREFILL_CHUNK = 512
_PREFILL_TOKENS_ON_CUDA = 4096  # of all rows; each chunk reads all weights


def stream(
    model: Qwen3Moe,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling = GREEDY,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer=None,
    seed: int | Sequence[int] = 0,
    prefill_chunk: int | None = None,
    capacity: int | None = None,
    prefill_backend: str = "auto",
    decode_backend: str = "auto",
    steps_per_dispatch: int | None = None,
    logprobs: int | None = None,
    platform: str | None = None,
    on_routing: Callable[[RoutingTrace], None] | None = None,
) -> Iterator[Event]:
    """Generates for every prompt; arguments are checked here, the work is done as one iterates.

    The next steps are started before a token is read, so that the device does not wait for Python.
    With N = steps_per_dispatch, tokens come in groups of up to N. The price is at most 2 N - 1
    steps too many at the end, and as many unreported tokens for a row with a stop string.

    Args:
      model: its parameters as they are now, in place; other arrays in it later change nothing.
        Where they lie on a mesh of data, expert and tensor (moe_jax.sharding), it generates there.
      prompts: rows of token ids, of any lengths.
      sampling: greedy by default.
      max_new_tokens: for every row.
      stop_ids: tokens that end a row.
      stop_strings: text that ends a row; needs a tokenizer. The text of special tokens counts, in
        full or in part, although it is not shown.
      tokenizer: an object with decode(ids) -> str, as moe_jax.tokenization's; None gives no text.
        Where its decode skips special tokens, stop strings find them by special_text(id) -> str,
        or None for an id that is not special.
      seed: row r draws from (seed, r), so its tokens do not depend on the rows beside it. A
        sequence has a seed for each row, and a row draws as if it were alone.
      prefill_chunk: columns of the prompts that run at once; changes memory, not results. None
        takes 512, and on CUDA as many more as make 4096 tokens of all rows.
      capacity: tokens that a cache row can hold; None takes what these shapes need. A fixed
        value serves calls of several lengths with one compiled step.
      prefill_backend, decode_backend: the experts', as in moe_jax.experts.experts. A name takes the
        blocks of decoder.py; "auto" may take the kernels that compute all layers of a decode step.
      steps_per_dispatch: the most decode steps that are started at once, because a slow host needs
        longer for a dispatch than a fast device for a step. Changes time, not results. None takes 8
        on CUDA and 1 elsewhere; a platform that may have no loops always takes 1.
      logprobs: n from 0 to V gives each event the log-probabilities of its token and of the n
        likeliest ones. They are the model's own: the float32 log-softmax of its raw logits, before
        penalties, bans, temperature and filters. None computes none and costs nothing.
      platform: what to write the steps for, as in moe_jax.platforms.resolve_platform.
      on_routing: called after each decode step with its RoutingTrace of NumPy arrays,
        [MoE layers, B, K]; rows that had ended have ids -1 and weights 0.

    Yields:
      Events, the rows in turn; a row that has ended has no more.

    Raises:
      ValueError, TypeError: an argument cannot be; the message names it, its value and what can.
      FloatingPointError: while iterating, if a row's logits are NaN; names row and token.
    """
    if not isinstance(model, Qwen3Moe):
        raise TypeError(f"model is {model!r}; expected a Qwen3Moe")
    config = model.config
    max_new_tokens = arguments.whole_number("max_new_tokens", max_new_tokens, least=1)
    rows = arguments.check_prompts(prompts, config, max_new_tokens)
    if not isinstance(sampling, Sampling):
        raise TypeError(f"sampling is {sampling!r}; expected a Sampling")
    platform = resolve_platform(platform)
    if prefill_chunk is None:
        prefill_chunk = _default_chunk(platform, len(rows))
    prefill_chunk = arguments.whole_number("prefill_chunk", prefill_chunk, least=1)
    longest = max(map(len, rows))
    columns = arguments.padded_length(longest, prefill_chunk)
    capacity = arguments.cache_capacity(columns, max_new_tokens, capacity, longest)
    stops = frozenset(arguments.check_token_ids("stop_ids", stop_ids, config.vocab_size))
    seeds, places = arguments.check_seed(seed, len(rows))
    if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
        raise TypeError(f"tokenizer is {tokenizer!r}; expected an object with decode(ids), or None")
    texts = [RowText(tokenizer, stop_strings) for _ in rows]
    if tokenizer is None and len(stop_strings):
        raise ValueError(f"stop_strings is {stop_strings!r} without tokenizer; expected both")
    for name, backend in (("prefill_backend", prefill_backend), ("decode_backend", decode_backend)):
        if not isinstance(backend, str) or backend not in ("auto", *EXPERTS_BACKENDS):
            accepted = sorted(EXPERTS_BACKENDS)
            raise ValueError(f"{name} is {backend!r}; expected auto or one of {accepted}")
    if steps_per_dispatch is not None:
        steps_per_dispatch = arguments.whole_number(
            "steps_per_dispatch", steps_per_dispatch, least=1
        )
    if logprobs is not None:
        V = config.vocab_size
        logprobs = arguments.whole_number("logprobs", logprobs, 0, V, f", as vocab_size is {V}")
    if on_routing is not None and not callable(on_routing):
        raise TypeError(f"on_routing is {on_routing!r}; expected a function of a RoutingTrace")
    if on_routing is not None and not config.moe_layers:
        raise ValueError("on_routing is given, but the model has no MoE layer to trace")
    parameters = to_arrays(model)
    parallelism = Parallelism.of(parameters)
    if parallelism is not None:
        parallelism.check(config)
    job = _Job(
        config=config,
        parameters=parameters,
        sampling=sampling.for_model(config.vocab_size, stops),
        rows=rows,
        columns=columns,
        prefill_chunk=min(prefill_chunk, columns),
        capacity=capacity,
        max_new_tokens=max_new_tokens,
        seeds=seeds,
        places=places,
        stop_ids=stops,
        texts=texts,
        prefill_backend=prefill_backend,
        decode_backend=decode_backend,
        platform=platform,
        loop=compiled.loop_for(platform, steps_per_dispatch, capacity),
        logprobs=logprobs,
        on_routing=on_routing,
        parallelism=parallelism,
    )
    return _events(job)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """The arguments of `stream`, checked and converted."""

    config: Qwen3MoeConfig
    parameters: dict[str, jax.Array]
    sampling: Sampling
    rows: list[np.ndarray]
    columns: int
    prefill_chunk: int
    capacity: int
    max_new_tokens: int
    seeds: np.ndarray
    places: np.ndarray
    stop_ids: frozenset[int]
    texts: list[RowText]
    prefill_backend: str
    decode_backend: str
    platform: str
    loop: compiled.Loop
    logprobs: int | None
    on_routing: Callable[[RoutingTrace], None] | None
    parallelism: Parallelism | None

    def prefill_plan(self) -> compiled.Plan:
        # Without what config.json has besides, which differs by checkpoint and computes nothing.
        config = dataclasses.replace(self.config, extra={})
        steps, platform = self.sampling.steps, self.platform
        return compiled.Plan(
            config,
            steps,
            self.prefill_backend,
            platform,
            capture=False,
            logprobs=self.logprobs,
            parallelism=self.parallelism,
        )

    def decode_plan(self) -> compiled.Plan:
        capture = self.on_routing is not None
        plan = self.prefill_plan()
        return plan._replace(backend=self.decode_backend, capture=capture, loop=self.loop)


def _events(job: _Job) -> Iterator[Event]:
    start = time.perf_counter()
    going = np.ones(len(job.rows), bool)
    index = 0
    for tokens, logprobs, traces in _tokens(job, going):
        seconds = time.perf_counter() - start
        logprobs, traces = jax.tree.map(np.asarray, (logprobs, traces))
        for place, of_rows in enumerate(tokens):
            if traces is not None:
                job.on_routing(_only_rows(traces.layer(place), going))
            is_last = index + 1 == job.max_new_tokens
            for row in np.flatnonzero(going).tolist():
                token = int(of_rows[row])
                text, reason = _read(job, row, index, token, is_last)
                going[row] = reason is None
                yield Event(
                    row=row,
                    index=index,
                    token_id=token,
                    text=text,
                    finish_reason=reason,
                    seconds=seconds,
                    logprobs=None if logprobs is None else of_token(logprobs, place, row),
                )
            if not going.any():
                return
            index += 1


_Group = tuple[np.ndarray, StepLogprobs | None, RoutingTrace | None]


def _tokens(job: _Job, going: np.ndarray) -> Iterator[_Group]:
    """Tokens [N, B] of prefill, N = 1, then of each dispatch; their logprobs and its N traces.

    A dispatch is started before the tokens of the one before it are read.

    Args:
      going: [B] bool. The caller sets it to False for a row that has ended, also where only the
        text tells: dispatches that start afterwards do nothing for it.
    """
    inputs, first = _prefill(job)
    plan = job.decode_plan()
    sampled, state = first.sampled, first.state
    tokens, logprobs, traces, count = first.sampled.tokens, first.logprobs, None, 1
    for ahead_count in job.loop.counts(job.max_new_tokens - 1):
        # `state` is donated; `sampled` is not. A copy of `going`, because that changes.
        ahead = compiled.decode(plan, inputs, state, sampled, going.copy(), np.int32(ahead_count))
        yield np.asarray(tokens).reshape(-1, len(going))[:count], logprobs, traces
        sampled, state = ahead.sampled, ahead.state
        tokens, logprobs, traces = ahead.tokens, ahead.logprobs, ahead.traces
        count = ahead_count
    yield np.asarray(tokens).reshape(-1, len(going))[:count], logprobs, traces


def _default_chunk(platform: str, B: int) -> int:
    """Columns of a chunk of B rows: a power of two, so that few shapes are compiled."""
    tokens = _PREFILL_TOKENS_ON_CUDA if platform == "cuda" else 0
    return max(_PREFILL_CHUNK, 1 << (tokens // B).bit_length() >> 1)


def _prefill(job: _Job) -> tuple[compiled.StepInputs, compiled.Step]:
    """Runs the prompts chunk by chunk; returns what all steps take, and the last chunk's Step."""
    plan = job.prefill_plan()
    inputs, state = compiled.begin(
        plan,
        job.capacity,
        job.parameters["embed_tokens.weight"].dtype,
        job.sampling.values(),
        job.seeds,
        job.places,
        token_table(sorted(job.stop_ids)),
    )
    inputs = inputs._replace(parameters=job.parameters)
    ids, valid = arguments.pad_left(job.rows, job.columns)
    for first in range(0, job.columns, job.prefill_chunk):
        chunk = slice(first, first + job.prefill_chunk)
        if job.platform == "cuda":
            # Attention there need not look at slots for what is known here. It is one program more
            # to compile for a prompt of several chunks, which elsewhere would gain nothing.
            is_first = first == 0
            unpadded = is_first and bool(valid[:, chunk].all())
            plan = plan._replace(empty_cache=is_first, unpadded=unpadded)
        step = compiled.prefill(plan, inputs, state, ids[:, chunk], valid[:, chunk])
        state = step.state
    return inputs, step


def _read(job: _Job, row: int, index: int, token: int, is_last: bool) -> tuple[str, str | None]:
    """The text that a token lets through, and why the row ends with it, if it does."""
    if token == NO_TOKEN:
        raise FloatingPointError(
            f"row {row}: the logits for its token {index} are NaN, or all -inf; no token can be "
            "chosen. Look for NaN in the weights, for overflow in their dtype, or for a sampling "
            "that bans every token"
        )
    text = job.texts[row]
    if token in job.stop_ids:
        return text.flush(), "stop_id"
    shown, stopped = text.push(token)
    if stopped:
        return shown, "stop_string"
    return (shown + text.flush(), "length") if is_last else (shown, None)


def _only_rows(trace: RoutingTrace, going: np.ndarray) -> RoutingTrace:
    """The trace with nothing in the rows that have ended, whatever the device did for them."""
    kept = going[None, :, None]
    return RoutingTrace(
        expert_ids=np.where(kept, trace.expert_ids, -1),
        expert_weights=np.where(kept, trace.expert_weights, np.float32(0)),
    )
