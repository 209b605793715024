"""The router as a grid of its three tasks: logits against float64, and the choice by these."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_step.add_residual import COLUMNS, AddResidual
from pallas_kernels.decode_step.norm_input import NormInput
from pallas_kernels.decode_step.tasks import Task, run_as_grid, run_in_python
from pallas_kernels.decode_step.top_k import TopK
from pallas_kernels.mosaic.operands import round_up
from tests.pallas_kernels.decode_step.cases import EPS, POISONED, best_experts, weights_of
from tests.pallas_kernels.machine import ON_GPU, lower_for_cuda, mosaic_modules

# Logits are of size 1. What float32 sums over H may be off, and then the weights.
LOGITS_BOUND = 1e-5
WEIGHTS_BOUND = 1e-5
RESULTS = ("logits", "ids", "weights", "normed")


class Size(NamedTuple):
    T: int
    E: int
    K: int
    H: int
    norm_topk_prob: bool = True

    def __str__(self):
        return "-".join(f"{letter}{size}" for letter, size in self._asdict().items())


# In interpret mode a shape that is new costs two seconds, so the tests share few of them.
USUAL = Size(T=8, E=128, K=8, H=128)
# Tokens beyond 8; three blocks of experts, the last not whole, ranked by rounds.
UNEVEN = Size(T=9, E=136, K=3, H=192, norm_topk_prob=False)
SIZES = [USUAL, UNEVEN, Size(T=2, E=512, K=10, H=64)]
if ON_GPU:
    SIZES += [
        Size(T=1, E=8, K=2, H=64),
        Size(T=3, E=8, K=8, H=192),
        Size(T=17, E=64, K=2, H=128),
        Size(T=33, E=512, K=32, H=64),
        Size(T=1, E=128, K=8, H=2048),
        Size(T=8, E=128, K=8, H=2048, norm_topk_prob=False),
        Size(T=64, E=128, K=8, H=2048),
        Size(T=64, E=160, K=8, H=6144),
        Size(T=64, E=512, K=10, H=2048),
        Size(T=5, E=128, K=8, H=2112),
    ]


def tasks_of(size: Size) -> list[Task]:
    T, E, K, H, norm_topk_prob = size
    N = round_up(T, 8)
    product = AddResidual(T=T, H=H, N=N, num_parts=1, E=E)
    norm = NormInput(T=T, H=H, N=N, eps=EPS, after="add")
    top_k = TopK(
        T=T, H=H, E=E, K=K, eps=EPS, num_splits=H // COLUMNS, norm_topk_prob=norm_topk_prob,
        after="add",
    )  # fmt: skip
    return [
        Task(
            kind="add",
            work=product,
            reads={name: name for name in ("x", "parts", "norm_weight", "gate")},
            writes={name: name for name in ("total", "squares", "partials")},
        ),
        Task(
            kind="norm",
            work=norm,
            reads={"squares": "squares", "norm_weight": "norm_weight", "total": "total"},
            writes={"normed": "normed"},
            waits_for={"add": norm.num_blocks},
        ),
        Task(
            kind="top_k",
            work=top_k,
            reads={name: name for name in ("partials", "squares", "valid")},
            writes={name: name for name in RESULTS if name != "normed"},
            waits_for={"add": top_k.num_blocks},
        ),
    ]


def make_case(size: Size, seed: int) -> dict[str, jax.Array]:
    """Normal x, with NaN in the padding rows, and logits of size 1; the norm's weight is 1.

    Nothing is added to x: its parts are zeros.
    """
    rng, padding = np.random.default_rng(seed), -size.T % 8
    x = np.pad(
        rng.standard_normal((size.T, size.H)), ((0, padding), (0, 0)), constant_values=np.nan
    )
    return {
        "x": jnp.asarray(x, jnp.bfloat16),
        "parts": jnp.zeros((1, *x.shape), jnp.float32),
        "norm_weight": jnp.ones(size.H, jnp.bfloat16),
        "gate": jnp.asarray(rng.standard_normal((size.E, size.H)) * size.H**-0.5, jnp.bfloat16),
        "valid": jnp.ones(size.T, jnp.int32),
    }


@functools.partial(jax.jit, static_argnames=("size", "interpret"))
def _route(case: dict[str, jax.Array], size: Size, interpret) -> dict[str, jax.Array]:
    found = run_as_grid(tasks_of(size), case, RESULTS, name="router", interpret=interpret)
    return found | {name: found[name].reshape(size.T, size.K) for name in ("ids", "weights")}


def route(case: dict[str, jax.Array], size: Size) -> dict[str, np.ndarray]:
    """Its results by name; padding rows of normed may hold anything."""
    found = jax.tree.map(np.asarray, _route(case, size, POISONED))
    return found | {"normed": found["normed"][: size.T]}


def exact_logits(case: dict[str, jax.Array], size: Size) -> np.ndarray:
    x = np.asarray(case["x"], np.float64)[: size.T]
    products = x @ np.asarray(case["gate"], np.float64).T
    return products / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + EPS)


def assert_chosen_by_its_own_logits(found: dict[str, np.ndarray], size: Size) -> None:
    """Exactly the choice that these very logits ask for, ties included, and their weights."""
    np.testing.assert_array_equal(found["ids"], best_experts(found["logits"], size.K))
    expected = weights_of(found["logits"], found["ids"], size.norm_topk_prob)
    np.testing.assert_allclose(found["weights"], expected, rtol=WEIGHTS_BOUND)


def assert_same_tokens(found, expected, tokens) -> None:
    for name in RESULTS:
        these, those = (some[name][tokens].view(np.uint8) for some in (found, expected))
        np.testing.assert_array_equal(these, those, err_msg=name)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_float64(size, seed):
    case = make_case(size, seed)
    found = route(case, size)
    assert (found["ids"].dtype, found["normed"].dtype) == (np.int32, jnp.bfloat16)
    np.testing.assert_allclose(found["logits"], exact_logits(case, size), rtol=0, atol=LOGITS_BOUND)
    assert_chosen_by_its_own_logits(found, size)
    x = np.asarray(case["x"], np.float64)[: size.T]
    normed = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + EPS)
    np.testing.assert_allclose(np.asarray(found["normed"], np.float64), normed, rtol=2**-8)


def test_the_norms_weight_counts(seed):
    rng = np.random.default_rng(seed)
    case = make_case(USUAL, seed)
    weight = jnp.asarray(1 + rng.standard_normal(USUAL.H) / 8, jnp.bfloat16)
    # Values so small that another eps would show.
    case |= {"norm_weight": weight, "x": case["x"] * jnp.bfloat16(2**-6)}
    found = route(case, USUAL)
    expected = run_in_python(tasks_of(USUAL), case)
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=0, atol=LOGITS_BOUND)
    normed = np.asarray(expected["normed"], np.float32)
    np.testing.assert_allclose(np.asarray(found["normed"], np.float32), normed, rtol=2**-7)
    assert_chosen_by_its_own_logits(found, USUAL)


@pytest.mark.parametrize("size", [USUAL, UNEVEN], ids=str)
def test_the_list_in_python_agrees(size, seed):
    case = make_case(size, seed)
    found, expected = route(case, size), run_in_python(tasks_of(size), case)
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=0, atol=LOGITS_BOUND)
    np.testing.assert_array_equal(found["ids"].ravel(), expected["ids"])
    np.testing.assert_allclose(found["weights"].ravel(), expected["weights"], rtol=1e-4)


# --- ties, and what is not finite


@pytest.mark.parametrize(("copies", "size"), [(5, USUAL), (5, UNEVEN), (384, UNEVEN)])
def test_ties_take_the_lower_index(copies, size, seed):
    # Small integers: sums are exact in whatever order, so that equal experts tie, and others too.
    x, gate = np.random.default_rng(seed).integers(-2, 3, (2, size.E, size.H))
    x, gate = x[: round_up(size.T, 8)], gate[np.arange(size.E) // copies * copies]
    case = make_case(size, seed)
    case |= {"x": jnp.asarray(x, jnp.bfloat16), "gate": jnp.asarray(gate, jnp.bfloat16)}
    found = route(case, size)
    exact = (x @ gate.T).astype(np.float32)[: size.T]
    np.testing.assert_array_equal(found["ids"], best_experts(exact, size.K))
    assert_chosen_by_its_own_logits(found, size)


@pytest.mark.parametrize("size", [USUAL, UNEVEN], ids=str)
def test_zeros_of_either_sign_tie(size, seed):
    zeros = np.zeros((round_up(size.T, 8), size.H), jnp.bfloat16)
    zeros[0] = -0.0
    found = route(make_case(size, seed) | {"x": jnp.asarray(zeros)}, size)
    assert found["ids"].tolist() == [list(range(size.K))] * size.T


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("size", [USUAL, UNEVEN], ids=str)
def test_a_bad_token_changes_no_other(size, seed):
    case = make_case(size, seed)
    good = route(case, size)
    x = np.array(case["x"])
    bad = [2, 5]
    x[bad] = [[np.nan], [np.inf]]
    found = route(case | {"x": jnp.asarray(x)}, size)
    others = [token for token in range(size.T) if token not in bad]
    assert_same_tokens(found, good, others)
    # Still K different experts, because what indexes with them must hold.
    for ids in found["ids"][bad]:
        assert len(set(ids.tolist())) == size.K and ids.min() >= 0 and ids.max() < size.E


def test_a_token_that_is_not_valid_has_no_expert(seed):
    case = make_case(USUAL, seed)
    good = route(case, USUAL)
    invalid, others = [0, 6], [1, 2, 3, 4, 5, 7]
    found = route(case | {"valid": case["valid"].at[jnp.array(invalid)].set(0)}, USUAL)
    assert (found["ids"][invalid] == -1).all()
    assert_same_tokens(found, good, others)


@pytest.mark.skipif(not ON_GPU, reason="a CPU's product of another width adds in another order")
@pytest.mark.parametrize("T", [1, 2, 8, 9, 33])
def test_bits_do_not_depend_on_the_batch(T, seed):
    largest = Size(T=64, E=128, K=8, H=2048)
    case = make_case(largest, seed)
    expected = route(case, largest)
    order = np.random.default_rng(seed).permutation(largest.T)
    for start in range(0, largest.T - T + 1, T):
        tokens = order[start : start + T]
        x = jnp.pad(case["x"][tokens], ((0, -T % 8), (0, 0)), constant_values=jnp.nan)
        found = route(case | {"x": x, "valid": case["valid"][:T]}, largest._replace(T=T))
        for name in RESULTS:
            np.testing.assert_array_equal(
                found[name].view(np.uint8), expected[name][tokens].view(np.uint8), err_msg=name
            )


@pytest.mark.parametrize(
    "size",
    [
        Size(T=9, E=128, K=8, H=2048),
        pytest.param(Size(T=1, E=128, K=8, H=2048), marks=pytest.mark.slow),
        pytest.param(Size(T=64, E=160, K=8, H=6144), marks=pytest.mark.slow),
        pytest.param(Size(T=33, E=512, K=32, H=2048), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_lowers_for_cuda(size):
    case = jax.eval_shape(lambda: make_case(size, 0))
    text = lower_for_cuda(lambda case: _route(case, size, False), case)
    [module] = mosaic_modules(text)
    # One signal, and two waits, the last of which sets it back to zero. No float32 sum is added to
    # memory in whatever order they come.
    added = re.findall(r"\b(?:red|atom)\.[\w.:]+", module)
    waits = 2 * ["atom.add.relaxed.gpu.global.u32"]
    assert sorted(added) == [*waits, "red.add.release.gpu.global.u32"]
    assert "atomicrmw" not in module
