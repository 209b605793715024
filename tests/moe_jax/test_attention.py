"""The attention backends: cuDNN's arguments mean what the op means, and which backend is taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attention import ATTENTION_BACKENDS, AttentionRequest, attention
from moe_jax.attention.cudnn import cudnn_attention
from moe_jax.attention.xla import xla_attention
from moe_jax.cache import init_cache
from moe_jax.dispatch import choose_backend, record_choices
from tests.moe_jax.tiny import TINY, model_of

B, HEADS, KV, S, D = 2, 4, 2, 6, 8
ON_GPU = jax.default_backend() == "gpu"
IN_ORDER = np.broadcast_to(np.arange(S), (B, S))
# Row 0 has two tokens of padding before, row 1 a gap; the cache holds three tokens, then nothing.
PADDED = np.array([[-1, -1, 0, 1, 2, 3], [0, 1, 1, 2, 3, 4]])
VALID = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]], bool)
CASES = {
    "unpadded": {
        "query_slots": IN_ORDER,
        "key_slots": IN_ORDER,
        "own_keys": True,
        "unpadded": True,
    },
    "padded": {"query_slots": PADDED, "key_slots": np.where(VALID, PADDED, -1), "own_keys": True},
    "a row of padding": {
        "query_slots": np.stack([IN_ORDER[0], np.full(S, -1)]),
        "key_slots": np.stack([IN_ORDER[0], np.full(S, -1)]),
        "own_keys": True,
    },
    "segments": {
        "query_slots": IN_ORDER,
        "key_slots": IN_ORDER,
        "segments": np.array([[0, 0, 1, 1, 1, 2], [4, 4, 4, 4, 5, 5]]),
        "own_keys": True,
    },
    "behind a cache": {
        "query_slots": IN_ORDER + 3,
        "key_slots": np.r_[0:9, [-1] * 3][None].repeat(B, axis=0),
    },
}


@pytest.mark.parametrize(
    ("case", "window"),
    [
        *(("unpadded", window) for window in (None, 3)),
        *(("padded", window) for window in (None, 3)),
        ("a row of padding", None),
        ("segments", 3),
        ("behind a cache", None),
        ("behind a cache", 3),
    ],
)
def test_cudnn_attends_to_what_the_op_says(case, window):
    """On a CPU by XLA's implementation of the same arguments; the GPU's by itself."""
    case, rng = CASES[case], np.random.default_rng(0)
    N = case["key_slots"].shape[1]
    dtype = jnp.bfloat16 if ON_GPU else jnp.float32
    q, k, v, target = (
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape in [(B, HEADS, S, D), *[(B, KV, N, D)] * 2, (B, HEADS, S, D)]
    )
    # Queries that are padding may get anything that is finite; those with a key are compared.
    own = case.get("own_keys", False) and "segments" not in case
    sees = (case["key_slots"] if own else case["query_slots"]) >= 0
    sees = sees[:, None, :, None]

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(attend, q, k, v):
        def loss(q, k, v):
            y = attend(q, k, v, window=window, **case)
            y = jnp.where(sees, y, 0 * y)
            return jnp.sum((y * target).astype(jnp.float32)), y

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    cudnn = cudnn_attention if ON_GPU else functools.partial(cudnn_attention, implementation="xla")
    (_, y), gradients = value_and_gradients(cudnn, q, k, v)
    (_, expected), expected_gradients = value_and_gradients(xla_attention, q, k, v)
    bound = 2e-2 if ON_GPU else 1e-5
    for one, other in zip((y, *gradients), (expected, *expected_gradients), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.isfinite(one).all()
        assert np.linalg.norm(one - other) < bound * np.linalg.norm(other)


def ask(**changes):
    request = {"platform": "cuda", "phase": "prefill", "T": B * S, "S": S, "N": S}
    return AttentionRequest(**request | {"heads": HEADS, "kv": KV, "D": D} | changes)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "cudnn"),
        ({"window": True, "segments": True, "phase": "training"}, "cudnn"),
        ({"phase": "decode"}, "xla"),
        ({"platform": "cpu"}, "xla"),
        ({"platform": "ascend"}, "xla"),
        ({"on_gpu": False}, "xla"),  # a process that writes for CUDA and has no cuDNN to ask
        ({"dtype": "float32"}, "xla"),
        ({"D": 12}, "xla"),
        ({"D": 256}, "xla"),
        ({"S": 5}, "cudnn"),
        ({"S": 5, "phase": "training"}, "xla"),
        ({"S": 5, "N": 5, "own_keys": True, "phase": "training"}, "cudnn"),
        ({"S": 5, "N": 5, "own_keys": True, "segments": True, "phase": "training"}, "xla"),
    ],
)
def test_what_auto_chooses(change, expected):
    choice = choose_backend(ask(**change), ATTENTION_BACKENDS)
    assert choice.backend == expected


MODEL = model_of(TINY)
CACHE = init_cache(TINY, B, S, "float32")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (True, True)),
        ({"labels": IN_ORDER}, (True, True)),
        ({"attention_mask": np.ones((B, S), np.int32)}, (True, False)),
        ({"cache": CACHE}, (False, False)),
        ({"cache": CACHE, "empty_cache": True}, (True, True)),
        ({"cache": CACHE, "empty_cache": True, "attention_mask": VALID.astype(int)}, (True, False)),
    ],
)
def test_the_model_says_what_it_knows_of_its_rows(options, expected):
    with record_choices() as record:
        jax.eval_shape(lambda: MODEL(IN_ORDER, **options).logits)
    assert {(r.own_keys, r.unpadded) for r, _ in record if r.op == "attention"} == {expected}


def test_an_empty_cache_is_filled_and_not_read():
    cache = init_cache(TINY, B, S + 2, "float32")
    run = jax.jit(
        lambda empty: MODEL(
            IN_ORDER, attention_mask=VALID.astype(int), cache=cache, empty_cache=empty
        ),
        static_argnums=0,
    )
    one, other = run(True), run(False)
    np.testing.assert_allclose(one.logits[VALID], other.logits[VALID], rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(one.cache), jax.tree.leaves(other.cache), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_backend_that_cannot_is_an_error_that_names_who_can():
    q = jnp.zeros((B, HEADS, S, D))
    with pytest.raises(NotImplementedError, match=r"'cudnn' does not do .*; xla can"):
        attention(q, q, q, query_slots=IN_ORDER, key_slots=IN_ORDER, backend="cudnn")
