"""Which backend computes an op, and why: one table for every op, read from the top.

An op is one function with several implementations of the same signature. Today these are "experts"
(moe_jax/experts), "attention" (moe_jax/attention) and "layers" (moe_jax/decode_step.py), which is
all layers of a call and whose plain implementation asks for the other two. An op's folder lists its
backends, each with what it can do. This file chooses one of them in Python, before anything is
traced.
`python -m experiments.backends` prints all of it.
"""

import contextlib
import contextvars
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, NamedTuple

import jax

PHASES = ("prefill", "decode", "training")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One call of an op, as far as it matters for which backend can run it.

    Each op has a subclass with its own sizes and features.

    Attributes:
      op: the op's name.
      platform: as moe_jax.platforms.resolve_platform returns it.
      phase: one of PHASES. Training needs gradients.
      T: tokens.
      dtype: of the tokens, as "bfloat16".
      activation: a name in moe_jax.activations.ACTIVATIONS; None for an op without one.
    """

    op: ClassVar[str]
    platform: str
    phase: str
    T: int
    dtype: str = "bfloat16"
    activation: str | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """By letter, the sizes that a backend may take in multiples only."""
        return {}

    @property
    def features(self) -> tuple[str, ...]:
        """What the call needs beside the plain op, in a backend's words."""
        return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute an op.

    Attributes:
      run: the computation; the op's api.py says with which arguments it is called.
      what: what it is, in one line.
      rel_error: dtype -> bound of ||y - reference|| / ||reference|| with every feature that it has,
        for weights and inputs of the size that a trained model has.
      platforms: where it runs, or None for everywhere.
      phases: those it is for.
      activations: those it has, or None for all.
      size_multiple: what each of a request's sizes must be a multiple of.
      features: those it has.
      gradients: whether it has them.
    """

    run: Callable[..., jax.Array]
    what: str
    rel_error: Mapping[str, float]
    platforms: tuple[str, ...] | None = None
    phases: tuple[str, ...] = PHASES
    activations: tuple[str, ...] | None = None
    size_multiple: int = 1
    features: tuple[str, ...] = ()
    gradients: bool = True

    def unsupported(self, request: Request) -> str | None:
        """What of the request the backend cannot do, in words; None if it can do all."""
        if self.platforms is not None and request.platform not in self.platforms:
            return f"platform {request.platform!r} (it runs on {', '.join(self.platforms)})"
        if request.phase not in self.phases:
            return f"phase {request.phase!r} (it is for {', '.join(self.phases)})"
        if request.phase == "training" and not self.gradients:
            return "gradients"
        if self.activations is not None and request.activation not in self.activations:
            return f"activation {request.activation!r} (it has {', '.join(self.activations)})"
        if request.dtype not in self.rel_error:
            return f"dtype {request.dtype} (it takes {', '.join(self.rel_error)})"
        sizes = request.sizes
        if any(size % self.size_multiple for size in sizes.values()):
            multiples = f"(it takes multiples of {self.size_multiple})"
            return f"{', '.join(sizes)} = {tuple(sizes.values())} {multiples}"
        return next((word for word in request.features if word not in self.features), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of the table.

    Attributes:
      op: the op it is about.
      backend: what is taken, unless it does not support the request.
      why: the reason.
      platforms: where it applies; None is everywhere.
      phases: when it applies.
      most_tokens: the most tokens it applies to; None is any number.
    """

    op: str
    backend: str
    why: str
    platforms: tuple[str, ...] | None = None
    phases: tuple[str, ...] = PHASES
    most_tokens: int | None = None

    def skip_reason(self, request: Request) -> str | None:
        """Why the rule does not apply; None if it does."""
        if self.op != request.op:
            return f"for {self.op}"
        if self.platforms is not None and request.platform not in self.platforms:
            return f"for {', '.join(self.platforms)}"
        if request.phase not in self.phases:
            return f"for {', '.join(self.phases)}"
        if self.most_tokens is None or self.most_tokens >= request.T:
            return None
        return f"for T <= {self.most_tokens}"


RULES: tuple[Rule, ...] = (
    Rule(
        op="layers",
        platforms=("cuda",),
        phases=("decode",),
        backend="pallas",
        why="the kernels' decode step has one or a few launches a layer, and loads weights ahead",
    ),
    Rule(
        op="layers",
        backend="blocks",
        why="the blocks of decoder.py one by one, with a backend each for experts and attention",
    ),
    Rule(
        op="experts",
        platforms=("cuda",),
        phases=("prefill", "decode"),
        most_tokens=512,
        backend="pallas",
        why="the decode kernels read each expert as few times as they can; faster than the grouped "
        "products up to T = 512, as measured on an H200",
    ),
    Rule(
        op="experts",
        platforms=("cuda",),
        backend="grouped_pallas",
        why="each expert's tokens multiplied together: K / E of the products, and gradients",
    ),
    Rule(
        op="experts",
        platforms=("cuda",),
        phases=("prefill", "decode"),
        most_tokens=2048,
        backend="pallas",
        why="the decode kernels are faster than plain XLA up to T = 2048, as measured on an H100",
    ),
    Rule(
        op="experts",
        backend="portable",
        why="plain XLA that any compiler takes; gathers if T * K < E, else multiplies all experts",
    ),
    Rule(
        op="attention",
        platforms=("cuda",),
        phases=("prefill", "training"),
        backend="cudnn",
        why="flash attention: no [S, N] scores of each head in memory",
    ),
    Rule(
        op="attention",
        backend="xla",
        why="two products and a softmax in plain XLA",
    ),
)


class BackendChoice(NamedTuple):
    """A backend's name, and why it was taken, the rules before it included."""

    backend: str
    why: str


def choose_backend(request: Request, backends: Mapping[str, Backend]) -> BackendChoice:
    """Says which of an op's backends `backend="auto"` runs.

    Raises:
      NotImplementedError: no rule's backend can do it.
    """
    unsupported = []
    for rule in RULES:
        if rule.skip_reason(request) is not None:
            continue
        lack = backends[rule.backend].unsupported(request)
        if lack is None:
            return BackendChoice(rule.backend, "; ".join([*unsupported, rule.why]))
        unsupported.append(f"{rule.backend} does not support {lack}")
    raise NotImplementedError(f"no {request.op} backend can do this: {'; '.join(unsupported)}")


def backend_variable(op: str) -> str:
    """The environment variable that names an op's backend where no argument does."""
    return f"MOE_JAX_{op.upper()}_BACKEND"


def backend_named(op: str, backend: str, *, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a caller or the environment names an op's backend, so that no table chooses it."""
    return backend != "auto" or bool(environment.get(backend_variable(op)))


_record: contextvars.ContextVar[list | None] = contextvars.ContextVar("record", default=None)


def resolve_backend(
    request: Request,
    backends: Mapping[str, Backend],
    backend: str = "auto",
    *,
    environment: Mapping[str, str] = os.environ,
) -> BackendChoice:
    """The backend that a call runs, and why.

    Args:
      request: the call.
      backends: the op's, by name.
      backend: one of their names, or "auto": what the environment variable names, and without that
        what RULES say.
      environment: where the variable is looked up.

    Raises:
      ValueError: there is no such backend.
      NotImplementedError: it cannot do what is asked; the message names those that can.
    """
    choice = _resolve(request, backends, backend, environment)
    if _record.get() is not None:
        _record.get().append((request, choice))
    return choice


def _resolve(request, backends, backend, environment) -> BackendChoice:
    source, variable = "backend", backend_variable(request.op)
    if backend == "auto" and environment.get(variable):
        source, backend = variable, environment[variable]
    if backend == "auto":
        return choose_backend(request, backends)
    if backend not in tuple(backends):
        raise ValueError(f"{source} is {backend!r}; expected 'auto' or one of {sorted(backends)}")
    lack = backends[backend].unsupported(request)
    if lack is not None:
        able = [name for name, other in backends.items() if other.unsupported(request) is None]
        who = f"{', '.join(able)} can" if able else "no backend can"
        raise NotImplementedError(f"{request.op} backend {backend!r} does not do {lack}; {who}")
    return BackendChoice(backend, f"{source} says so")


@contextlib.contextmanager
def record_choices() -> Iterator[list[tuple[Request, BackendChoice]]]:
    """Lists every call of an op that is traced inside the block, and what it chose.

    A compiled function that was traced before is not traced again, and adds nothing.
    """
    token = _record.set([])
    try:
        yield _record.get()
    finally:
        _record.reset(token)
