"""Every backend against the float32 reference, and what a backend cannot do."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.experts import BACKENDS, ExpertWeights, choose_backend, experts
from pallas_kernels.decode_experts import reference_experts

T, K, E, H, I = 6, 2, 5, 64, 128
HERE = jax.default_backend()
# bf16: the output's rounding, and the intermediate's in the XLA backends (README: 1.7e-3, 2.4e-3).
BOUNDS = {jnp.float32: 1e-5, jnp.bfloat16: 4e-3}


def make(dtype, *, T=T, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    weights = ExpertWeights(
        gate_up=(jax.random.normal(keys[0], (E, 2, I, H)) / H**0.5).astype(dtype),
        down=(jax.random.normal(keys[1], (E, H, I)) / I**0.5).astype(dtype),
    )
    x = jax.random.normal(keys[2], (T, H)).astype(dtype)
    ids = jnp.argsort(jax.random.uniform(keys[3], (T, E)), axis=1)[:, :K].astype(jnp.int32)
    w = jax.nn.softmax(jax.random.normal(keys[4], (T, K)))
    return x, weights, ids, w


def relative_error(y, reference):
    y, reference = np.asarray(y, np.float64), np.asarray(reference, np.float64)
    return np.linalg.norm(y - reference) / np.linalg.norm(reference)


def able(activation="silu", dtype="bfloat16"):
    step = {"activation": activation, "dtype": dtype, "sizes": (H, I), "platform": HERE}
    return [name for name, backend in BACKENDS.items() if backend.lacks(**step) is None]


def cases():
    return [(name, dtype) for dtype in BOUNDS for name in able(dtype=jnp.dtype(dtype).name)]


def test_the_kernels_are_among_the_backends():
    assert {"reference", "gather", "grouped"} < set(able())
    assert "pallas" in able() or "pallas_interpret" in able()


@pytest.mark.parametrize(("backend", "dtype"), cases())
def test_backend_is_close_to_float32(backend, dtype):
    x, weights, ids, w = make(dtype)
    ids = ids.at[1, 0].set(-1).at[2].set(E)  # padding of one entry, and of a whole row
    x = x.at[2].set(jnp.nan)
    w = w.at[2].set(jnp.inf)
    y = experts(x, weights, ids, w, backend=backend)
    assert (y.shape, y.dtype) == ((T, H), dtype)
    assert relative_error(y, reference_experts(x, weights, ids, w)) < BOUNDS[dtype]
    assert not np.asarray(y[2], np.float32).any()


@pytest.mark.parametrize("backend", ["gather", "grouped"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_other_activations(backend, activation):
    arguments = make(jnp.float32)
    y = experts(*arguments, activation=activation, backend=backend)
    expected = experts(*arguments, activation=activation, backend="reference")
    assert relative_error(y, expected) < 1e-5
    assert relative_error(y, experts(*arguments, backend="reference")) > 1e-2


@pytest.mark.parametrize("backend", ["reference", "gather", "grouped"])
def test_gradients_are_the_references(backend):
    x, weights, ids, w = make(jnp.float32)
    ids = ids.at[2].set(-1)
    target = jax.random.normal(jax.random.key(9), (T, H))

    def loss(backend, x, weights, w):
        return jnp.sum(experts(x, weights, ids, w, backend=backend) * target)

    gradient = functools.partial(jax.grad(loss, argnums=(1, 2, 3)))
    found, expected = (gradient(name, x, weights, w) for name in (backend, "reference"))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    # Padding that holds NaN leaves no trace.
    poisoned = gradient(backend, x.at[2].set(jnp.nan), weights, w.at[2].set(jnp.nan))
    chex.assert_trees_all_close(poisoned, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["gather", "grouped"])
@pytest.mark.parametrize("chunk", [1, 4, 6, 7])
def test_chunks_change_nothing(backend, chunk):
    arguments = make(jnp.float32)
    whole = experts(*arguments, backend=backend)
    chex.assert_trees_all_close(
        experts(*arguments, backend=backend, chunk=chunk), whole, rtol=1e-6, atol=1e-6
    )


def test_an_inf_in_an_expert_that_nobody_uses_changes_nothing():
    x, weights, ids, w = make(jnp.float32)
    ids = jnp.where(ids == 4, -1, ids)
    infinite = ExpertWeights(
        gate_up=weights.gate_up.at[4].set(jnp.inf), down=weights.down.at[4].set(jnp.inf)
    )
    for backend in ("reference", "gather"):  # grouped needs finite weights, as it says
        chex.assert_trees_all_equal(
            experts(x, infinite, ids, w, backend=backend),
            experts(x, weights, ids, w, backend=backend),
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
    assert "reference, gather, grouped" in str(raised.value)


def test_sizes_that_the_kernels_lack():
    kernels = BACKENDS["pallas"]
    step = {"activation": "silu", "dtype": "bfloat16", "platform": "cuda"}
    assert kernels.lacks(**step, sizes=(64, 128)) is None
    assert "multiples of 64" in kernels.lacks(**step, sizes=(64, 96))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="backend is 'triton'; expected 'auto' or one of"):
        experts(*make(jnp.float32), backend="triton")
    with pytest.raises(ValueError, match="chunk is 0"):
        experts(*make(jnp.float32), chunk=0)


@pytest.mark.parametrize(
    ("platform", "decode", "T", "lack", "expected"),
    [
        ("cuda", True, 1, None, "pallas"),
        ("cuda", True, 64, None, "pallas"),
        ("cuda", True, 65, None, "grouped"),
        ("cuda", True, 1, "dtype float32", "gather"),
        ("cuda", False, 512, None, "grouped"),
        ("cpu", True, 1, "platform 'cpu'", "gather"),
        ("cpu", True, 16, "platform 'cpu'", "grouped"),
        ("cpu", False, 1, "platform 'cpu'", "grouped"),
    ],
)
def test_what_auto_chooses(platform, decode, T, lack, expected):
    choice = choose_backend(platform=platform, decode=decode, T=T, K=8, E=128, kernels_lack=lack)
    assert choice.backend == expected
    assert choice.why
