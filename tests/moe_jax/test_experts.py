"""Every backend against the float32 reference, what a backend cannot do, and which one is taken."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import choose_backend, record_choices, resolve_backend
from moe_jax.experts import EXPERTS_BACKENDS, ExpertsRequest, ExpertWeights, experts
from pallas_kernels.decode_experts import reference_experts

T, K, E, H, I = 4, 2, 5, 64, 128
HERE = "cpu" if jax.default_backend() == "cpu" else "cuda"
# bf16: the output's rounding, and the intermediate's in the XLA backends (README: 1.7e-3, 2.4e-3).
BOUNDS = {jnp.float32: 1e-5, jnp.bfloat16: 4e-3}


def make(dtype, *, T=T, seed=0):
    """x, weights, ids, routing weights: NumPy's, because JAX would compile each operation."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale):
        return jnp.asarray(rng.normal(size=shape) * scale, dtype)

    weights = ExpertWeights(
        gate_up=normal(E, 2, I, H, scale=H**-0.5), down=normal(E, H, I, scale=I**-0.5)
    )
    x = normal(T, H, scale=1.0)
    ids = rng.permuted(np.tile(np.arange(E, dtype=np.int32), (T, 1)), axis=1)[:, :K]
    return x, weights, jnp.asarray(ids), jnp.asarray(rng.dirichlet(np.ones(K), T), jnp.float32)


OPTIONS = ("activation", "backend", "chunk", "phase", "platform")
run = jax.jit(experts, static_argnames=OPTIONS)  # one program for each call, and not for each op
reference = jax.jit(reference_experts)


def relative_error(y, reference):
    y, reference = np.asarray(y, np.float64), np.asarray(reference, np.float64)
    return np.linalg.norm(y - reference) / np.linalg.norm(reference)


def ask(**changes):
    request = {"platform": HERE, "phase": "decode", "T": T, "K": K, "E": E, "width": H, "I": I}
    return ExpertsRequest(**request | changes)


def able(dtype="bfloat16"):
    request = ask(dtype=dtype)
    return [name for name, b in EXPERTS_BACKENDS.items() if b.unsupported(request) is None]


def cases():
    return [(name, dtype) for dtype in BOUNDS for name in able(dtype=jnp.dtype(dtype).name)]


def test_the_kernels_are_among_the_backends():
    assert {"reference", "portable", "grouped"} < set(able())
    assert "pallas" in able() or "pallas_interpret" in able()


def test_a_shard_with_fewer_experts_than_a_token_takes_has_no_kernel():
    choice = choose_backend(ask(platform="cuda", E=K - 1), EXPERTS_BACKENDS)
    assert choice.backend == "portable"
    assert choice.why.startswith("pallas does not support more experts for a token than a shard h")


@pytest.mark.parametrize(("backend", "dtype"), cases())
def test_backend_is_close_to_float32(backend, dtype):
    x, weights, ids, w = make(dtype)
    ids = ids.at[1, 0].set(-1).at[2].set(E)  # padding of one entry, and of a whole row
    x = x.at[2].set(jnp.nan)
    w = w.at[2].set(jnp.inf)
    y = run(x, weights, ids, w, backend=backend)
    assert (y.shape, y.dtype) == ((T, H), dtype)
    assert relative_error(y, reference(x, weights, ids, w)) < BOUNDS[dtype]
    assert not np.asarray(y[2], np.float32).any()


@pytest.mark.parametrize("backend", ["portable", "grouped"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_other_activations(backend, activation):
    arguments = make(jnp.float32)
    y = run(*arguments, activation=activation, backend=backend)
    expected = run(*arguments, activation=activation, backend="reference")
    assert relative_error(y, expected) < 1e-5
    assert relative_error(y, run(*arguments, backend="reference")) > 1e-2


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.grad, argnums=(1, 2, 4))
def gradient(backend, x, weights, ids, w, target):
    return jnp.sum(experts(x, weights, ids, w, backend=backend, phase="training") * target)


@pytest.mark.parametrize("backend", ["reference", "portable", "grouped"])
def test_gradients_are_the_references(backend):
    x, weights, ids, w = make(jnp.float32)
    ids, target = ids.at[2].set(-1), make(jnp.float32, seed=9)[0]
    found, expected = (
        gradient(name, x, weights, ids, w, target) for name in (backend, "reference")
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    # Padding that holds NaN leaves no trace.
    poisoned = gradient(backend, x.at[2].set(jnp.nan), weights, ids, w.at[2].set(jnp.nan), target)
    chex.assert_trees_all_close(poisoned, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [name for name in able() if name.startswith("pallas")])
def test_gradients_of_the_kernels_are_the_portable_ones(backend):
    arguments = make(jnp.bfloat16, T=2)
    target = jnp.ones((2, H))
    found = gradient(backend, *arguments, target)
    chex.assert_trees_all_equal(found, gradient("portable", *arguments, target))


def test_a_backend_without_gradients_is_not_for_training():
    no_gradients = dataclasses.replace(EXPERTS_BACKENDS["portable"], gradients=False)
    assert no_gradients.unsupported(ask(phase="training")) == "gradients"
    assert no_gradients.unsupported(ask(phase="prefill")) is None


@pytest.mark.parametrize("backend", ["portable", "grouped"])
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_change_nothing(backend, chunk):
    arguments = make(jnp.float32)
    whole = run(*arguments, backend=backend)
    chex.assert_trees_all_close(
        run(*arguments, backend=backend, chunk=chunk), whole, rtol=1e-6, atol=1e-6
    )


def test_an_inf_in_an_unused_expert_changes_nothing():
    x, weights, ids, w = make(jnp.float32)
    ids = jnp.where(ids == 4, -1, ids)
    infinite = ExpertWeights(
        gate_up=weights.gate_up.at[4].set(jnp.inf), down=weights.down.at[4].set(jnp.inf)
    )
    # grouped, and portable where it multiplies all experts, need finite weights, as they say
    x, ids, w = x[:2], ids[:2], w[:2]  # T * K = 4 < E = 5: gathered
    for backend in ("reference", "portable"):
        chex.assert_trees_all_equal(
            run(x, infinite, ids, w, backend=backend),
            run(x, weights, ids, w, backend=backend),
        )


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        ({"activation": "gelu"}, "activation 'gelu'"),
        ({"dtype": jnp.float32}, "dtype float32"),
        ({"backend": "pallas" if HERE == "cpu" else "pallas_interpret"}, "platform"),
    ],
)
def test_what_a_backend_cannot_do_is_an_error_that_names_who_can(change, lacks):
    arguments = make(change.pop("dtype", jnp.bfloat16))
    backend = "pallas_interpret" if HERE == "cpu" else "pallas"
    with pytest.raises(NotImplementedError, match=f"does not do {lacks}") as raised:
        experts(*arguments, **{"backend": backend, **change})
    assert "reference, portable, grouped" in str(raised.value)


def test_the_portable_backend_gathers_or_multiplies_all():
    for T, form in ((2, "gather"), (3, "dense")):  # T * K = 4 < E = 5 <= 6
        text = run.lower(*make(jnp.float32, T=T), backend="portable")
        assert ("stablehlo.gather" in text.as_text()) == (form == "gather")


@pytest.mark.parametrize(
    ("change", "lack"),
    [
        ({}, None),
        ({"I": 96}, "H, I = (64, 96) (it takes multiples of 64)"),
        ({"width": 96, "latent": True}, "L, I = (96, 128) (it takes multiples of 64)"),
        ({"quantised": True}, None),
        (
            {"quantised": True, "whole_blocks": False},
            "FP8 weights in other blocks than whole ones of 128 x 128",
        ),
        ({"platform": "ascend"}, "platform 'ascend' (it runs on cuda)"),
    ],
)
def test_what_the_kernels_lack(change, lack):
    assert EXPERTS_BACKENDS["pallas"].unsupported(ask(**{"platform": "cuda"} | change)) == lack


def test_wrong_arguments():
    with pytest.raises(ValueError, match="backend is 'triton'; expected 'auto' or one of"):
        experts(*make(jnp.float32), backend="triton")
    with pytest.raises(ValueError, match="chunk is 0"):
        experts(*make(jnp.float32), chunk=0)
    with pytest.raises(ValueError, match="phase is 'generation'; expected one of"):
        experts(*make(jnp.float32), phase="generation")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": (0,)}, ValueError, r"x has shape \(64,\); expected \[T, H\]"),
        ({"ids": slice(3)}, ValueError, r"ids has shape \(3, 2\); expected \[T, K\] with T = 4"),
        ({"ids": "float32"}, TypeError, "ids has dtype float32; expected integer values"),
        ({"ids": "bool"}, TypeError, "ids has dtype bool"),
        ({"w": (slice(None), slice(1))}, ValueError, r"\(4, 1\); expected \(4, 2\), as ids"),
        ({"w": slice(3)}, ValueError, r"expert_weights has shape \(3, 2\)"),
        ({"w": "int32"}, TypeError, "expert_weights has dtype int32; expected floating values"),
    ],
)
def test_an_array_that_does_not_fit_is_named(change, error, message):
    x, weights, ids, w = make(jnp.float32)
    arrays = {"x": x, "ids": ids, "w": w}
    for name, how in change.items():
        arrays[name] = arrays[name].astype(how) if isinstance(how, str) else arrays[name][how]
    for backend in ("auto", "grouped"):
        with pytest.raises(error, match=message):
            experts(arrays["x"], weights, arrays["ids"], arrays["w"], backend=backend)


def test_weights_that_do_not_fit_each_other_are_named():
    x, weights, ids, w = make(jnp.float32)
    wrong = dataclasses.replace(weights, down=weights.down.swapaxes(1, 2))
    with pytest.raises(
        ValueError, match=r"weights.down has shape \(5, 128, 64\); .* \(5, 64, 128\)"
    ):
        experts(x, wrong, ids, w)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"platform": "cuda"}, "pallas"),
        ({"platform": "cuda", "T": 512}, "pallas"),
        ({"platform": "cuda", "T": 513}, "grouped_pallas"),
        ({"platform": "cuda", "dtype": "float32"}, "portable"),
        ({"platform": "cuda", "activation": "gelu"}, "portable"),
        ({"platform": "cuda", "phase": "prefill", "T": 512}, "pallas"),
        ({"platform": "cuda", "phase": "prefill", "T": 2049}, "grouped_pallas"),
        ({"platform": "cuda", "phase": "training", "T": 1}, "grouped_pallas"),
        ({"platform": "cuda", "phase": "prefill", "T": 513, "quantised": True}, "grouped_pallas"),
        # What the grouped products do not take.
        ({"platform": "cuda", "phase": "prefill", "T": 2048, "width": 64}, "pallas"),
        ({"platform": "cuda", "phase": "prefill", "T": 2049, "width": 64}, "portable"),
        ({"platform": "cuda", "phase": "prefill", "T": 2048, "hopper": False}, "pallas"),
        ({"platform": "cuda", "phase": "training", "hopper": False}, "portable"),
        ({"platform": "cuda", "phase": "training", "width": 64}, "portable"),
        ({"platform": "cpu"}, "portable"),
        ({"platform": "cpu", "phase": "training"}, "portable"),
        ({"platform": "ascend"}, "portable"),
        ({"platform": "ascend", "phase": "prefill", "latent": True}, "portable"),
        ({"platform": "tpu"}, "portable"),
    ],
)
def test_what_auto_chooses(change, expected):
    choice = choose_backend(ask(**{"width": 128} | change), EXPERTS_BACKENDS)
    assert choice.backend == expected
    assert choice.why


def test_auto_says_what_the_better_backend_lacked():
    choice = choose_backend(ask(platform="cuda", dtype="float32"), EXPERTS_BACKENDS)
    assert choice.why.startswith("pallas does not support dtype float32 (it takes bfloat16); ")


def test_the_environment_chooses_unless_an_argument_does():
    environment = {"MOE_JAX_EXPERTS_BACKEND": "grouped"}
    resolve = functools.partial(resolve_backend, ask(platform="cpu"), EXPERTS_BACKENDS)
    choice = resolve(environment=environment)
    assert choice == ("grouped", "MOE_JAX_EXPERTS_BACKEND says so")
    assert resolve("reference", environment=environment).backend == "reference"
    assert resolve(environment={}).backend == "portable"
    assert resolve(environment={"MOE_JAX_ATTENTION_BACKEND": "xla"}).backend == "portable"
    with pytest.raises(ValueError, match="MOE_JAX_EXPERTS_BACKEND is 'triton'; expected 'auto' or"):
        resolve(environment={"MOE_JAX_EXPERTS_BACKEND": "triton"})
    with pytest.raises(NotImplementedError, match="'pallas' does not do platform 'cpu'"):
        resolve(environment={"MOE_JAX_EXPERTS_BACKEND": "pallas"})


def test_what_was_chosen_is_on_record():
    def trace(**options):
        jax.eval_shape(functools.partial(experts, **options), *make(jnp.float32))

    with record_choices() as record:
        trace(platform="NPU", phase="decode")
        trace(backend="reference")
    trace()
    assert [(r.platform, r.phase, choice.backend) for r, choice in record] == [
        ("ascend", "decode", "portable"),
        (HERE, "prefill", "reference"),
    ]


def test_a_request_says_the_format_that_the_kernels_read():
    assert ask(quantised=True).shapes.weights == "fp8"
    assert ask().shapes.weights == "bf16"
