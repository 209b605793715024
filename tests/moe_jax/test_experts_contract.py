"""Every backend, with and without latent projections and shared experts, in every phase.

Either the result is the float32 definition's within the bound that the backend states, or the error
says which backend cannot and which one can. The definition here is plain NumPy in float64.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import PHASES
from moe_jax.experts import (
    EXPERTS_BACKENDS,
    ExpertsRequest,
    ExpertWeights,
    SharedExperts,
    experts,
)
from moe_jax.platforms import resolve_platform

T, K, E, H, I, N = 3, 2, 6, 128, 64, 96
# L = H too: there a projection that is left out, or taken for the other, raises no error.
WIDTHS = (None, 64, H)


def draw(width, shared, dtype, seed):
    L, rng = width or H, np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.5, dtype)

    x = jnp.asarray(rng.normal(size=(T, H)), dtype)
    weights = ExpertWeights(gate_up=normal(E, 2, I, L), down=normal(E, L, I))
    ids = rng.permuted(np.tile(np.arange(E, dtype=np.int32), (T, 1)), axis=1)[:, :K]
    ids[1, 0] = -1
    ids, w = jnp.asarray(ids), jnp.asarray(rng.dirichlet(np.ones(K), T), jnp.float32)
    extras = {"fc1_latent_proj": None, "fc2_latent_proj": None, "shared_experts": None}
    if width is not None:
        extras |= {"fc1_latent_proj": normal(L, H), "fc2_latent_proj": normal(H, L)}
    if shared:
        extras["shared_experts"] = SharedExperts(normal(N, H), normal(N, H), normal(H, N))
    return (x, weights, ids, w), extras


def in_float64(arguments, extras):
    (x, weights, ids, w), e = jax.tree.map(lambda a: np.asarray(a, np.float64), (arguments, extras))

    def mlp(x, gate, up, down):
        a = gate @ x
        return down @ (a / (1 + np.exp(-a)) * (up @ x))

    rows = []
    for t in range(T):
        z = x[t] if e["fc1_latent_proj"] is None else e["fc1_latent_proj"] @ x[t]
        y = sum(
            w[t, k] * mlp(z, *weights.gate_up[int(i)], weights.down[int(i)])
            for k, i in enumerate(ids[t])
            if i >= 0
        )
        out = y if e["fc2_latent_proj"] is None else e["fc2_latent_proj"] @ y
        if e["shared_experts"] is not None:
            out = out + mlp(x[t], *e["shared_experts"])
        rows.append(out)
    return np.stack(rows)


def relative_error(y, reference):
    return np.linalg.norm(np.asarray(y, np.float64) - reference) / np.linalg.norm(reference)


def check(backend, cases, phases):
    """The contract: returns "equal" or "refused"; anything else is an AssertionError.

    All cases are one program, because each would take as long to compile. The results are those
    of the first phase; the others compute the very same.

    Args:
      backend: its name.
      cases: what draw returns, all of one dtype.
      phases: of PHASES.
    """

    def trace(phase):
        # A function of its own each time, because jit would remember another backend's.
        run = functools.partial(experts, backend=backend, phase=phase)
        every = jax.jit(lambda cases: [run(*arguments, **extras) for arguments, extras in cases])
        return every.trace(cases)

    try:
        traced, *others = map(trace, phases)
    except NotImplementedError as error:
        message, able = str(error), EXPERTS_BACKENDS.keys() - {backend}
        assert repr(backend) in message, message
        assert any(f"{name}," in message or f"{name} can" in message for name in able), message
        return "refused"
    assert all(str(other.jaxpr) == str(traced.jaxpr) for other in others)
    for (arguments, extras), y in zip(cases, traced.lower().compile()(cases), strict=True):
        bound = EXPERTS_BACKENDS[backend].rel_error[jnp.dtype(y.dtype).name]
        error = relative_error(y, in_float64(arguments, extras))
        given = [name for name, extra in extras.items() if extra is not None]
        assert error < bound, (given, arguments[1].gate_up.shape)
    return "equal"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("backend", EXPERTS_BACKENDS)
def test_equal_or_refused(backend, dtype):
    combinations = list(itertools.product(WIDTHS, (False, True)))
    if dtype == "float16":  # which differs from the others in its bound only
        combinations = combinations[-1:]
    cases = [draw(width, shared, dtype, seed) for seed, (width, shared) in enumerate(combinations)]
    sizes = {"T": T, "K": K, "E": E, "width": H, "I": I}
    requests = [
        ExpertsRequest(platform=resolve_platform(), phase=phase, dtype=dtype, **sizes)
        for phase in PHASES
    ]
    [able] = {EXPERTS_BACKENDS[backend].unsupported(request) is None for request in requests}
    assert check(backend, cases, PHASES) == ("equal" if able else "refused")


def _without(*names):
    """A run that takes what it is asked to and does not use it."""

    def run(*arguments, **options):
        return EXPERTS_BACKENDS["reference"].run(*arguments, **options | dict.fromkeys(names))

    return run


def _swapped(*arguments, fc1_latent_proj, fc2_latent_proj, **options):
    return EXPERTS_BACKENDS["reference"].run(
        *arguments, fc1_latent_proj=fc2_latent_proj, fc2_latent_proj=fc1_latent_proj, **options
    )


def _only_fc1(x, weights, ids, w, *, fc1_latent_proj, fc2_latent_proj, **options):
    eye = jnp.eye(H, dtype=x.dtype)
    return EXPERTS_BACKENDS["reference"].run(
        x, weights, ids, w, fc1_latent_proj=fc1_latent_proj, fc2_latent_proj=eye, **options
    )


@pytest.mark.parametrize(
    "run",
    [
        _without("fc1_latent_proj", "fc2_latent_proj"),
        _without("shared_experts"),
        _swapped,
        _only_fc1,
    ],
    ids=["ignores latent", "ignores shared", "swaps the projections", "drops fc2"],
)
def test_a_backend_that_computes_something_else_is_caught(monkeypatch, run):
    wrong = dataclasses.replace(EXPERTS_BACKENDS["portable"], run=run)
    monkeypatch.setitem(EXPERTS_BACKENDS, "wrong", wrong)
    with pytest.raises(AssertionError):  # bfloat16 has the widest bound
        check("wrong", [draw(H, True, "bfloat16", seed=5)], ("decode",))


def test_latent_and_shared_are_keywords_only():
    arguments, extras = draw(H, False, "float32", seed=6)
    with pytest.raises(TypeError):
        experts(*arguments, "silu", extras["fc1_latent_proj"], extras["fc2_latent_proj"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc2_latent_proj": None}, "only fc1_latent_proj is given; expected both"),
        ({"fc1_latent_proj": None}, "only fc2_latent_proj is given; expected both"),
        (
            {"fc1_latent_proj": None, "fc2_latent_proj": None},
            "x has H = 128 and the experts take 64",
        ),
        (
            {"fc1_latent_proj": jnp.ones((H, 64))},
            r"fc1_latent_proj has shape \(128, 64\); expected \[L, H\] = \(64, 128\)",
        ),
        (
            {"shared_experts": SharedExperts(*[jnp.ones((N, H))] * 3)},
            r"shared_experts.down_proj has shape \(96, 128\); expected \[H, N\] = \(128, 96\)",
        ),
    ],
)
def test_latent_and_shared_that_do_not_fit(change, message):
    arguments, extras = draw(64, True, "float32", seed=7)
    with pytest.raises(ValueError, match=message):
        experts(*arguments, **extras | change)


@pytest.mark.parametrize("backend", ["reference", "portable", "grouped"])
def test_padding_is_zero_whatever_it_holds(backend):
    (x, weights, ids, w), extras = draw(64, True, "float32", seed=8)
    x, ids = x.at[2].set(jnp.nan), ids.at[2].set(E)
    y = jax.jit(functools.partial(experts, backend=backend))(x, weights, ids, w, **extras)
    assert not np.asarray(y[2]).any()
    assert np.isfinite(np.asarray(y)).all()


def test_chunks_on_ascend_are_unrolled_and_change_nothing():
    arguments, extras = draw(64, True, "float32", seed=9)

    def lower(chunk):
        run = functools.partial(experts, platform="ascend", chunk=chunk)
        return jax.jit(run).lower(*arguments, **extras)

    assert "while" not in lower(2).as_text()
    chunked, whole = (lower(chunk).compile()(*arguments, **extras) for chunk in (2, None))
    assert relative_error(chunked, np.asarray(whole, np.float64)) < 1e-5
