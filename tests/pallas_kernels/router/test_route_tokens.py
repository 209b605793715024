"""The kernel against its plain twin, and what must hold for its bits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.compare.presets import PRESETS
from pallas_kernels.router import route_tokens
from pallas_kernels.router.work import COLUMNS, Work
from tests.pallas_kernels.decode_experts.cases import assert_same_bits, bits
from tests.pallas_kernels.machine import (
    INTERPRET,
    ON_GPU,
    calls_with_poisoned_output,
    lower_for_cuda,
    mosaic_modules,
)
from tests.pallas_kernels.races import run_and_assert_no_races
from tests.pallas_kernels.router.cases import Case, Size, assert_right, make_case

SIZES = [
    Size(T=1, E=8, K=2, H=64),
    Size(T=3, E=64, K=2, H=128),
    Size(T=8, E=128, K=8, H=64),
    Size(T=17, E=128, K=8, H=192),
    Size(T=2, E=8, K=8, H=64),
    Size(T=2, E=512, K=3, H=64),  # so many that ranks come by rounds
]
if ON_GPU:
    SIZES += [
        Size(T=33, E=512, K=32, H=64),
        Size(T=5, E=16, K=3, H=2112),  # 33 pieces: the last split is shorter
        Size(T=1, E=128, K=8, H=2048),
        Size(T=8, E=128, K=8, H=2048),
        Size(T=64, E=128, K=8, H=2048),
        Size(T=128, E=128, K=8, H=4096),
        Size(T=128, E=160, K=8, H=6144),
        Size(T=128, E=512, K=10, H=2048),
    ]
USUAL = Size(T=8, E=128, K=4, H=128)
# Batches whose tokens are those of the largest. In interpret mode all have 8 columns: a CPU's
# matrix product adds in another order if it is wider.
BATCHES = [1, 2, 8, 9, 33, 64, 97] if ON_GPU else [1]
LARGEST_BATCH = Size(T=128, E=128, K=8, H=2048) if ON_GPU else USUAL


def run(case: Case, K: int, *, norm=False, **keywords):
    keywords = {"interpret": INTERPRET} | keywords
    norm_weight = case.norm_weight if norm else None
    return route_tokens(case.x, case.gate, K=K, norm_weight=norm_weight, **keywords)


def assert_same_tokens(found, expected, which) -> None:
    """Found's tokens have the bits of expected's tokens `which`."""
    for name in ("ids", "weights", "logits"):
        assert_same_bits(getattr(found, name), getattr(expected, name)[which])


# --- right on fresh inputs


# SIZES[1] is test_with_a_norm's.
@pytest.mark.parametrize("size", [SIZES[0], *SIZES[2:]], ids=str)
def test_matches_reference(size, seed):
    case = make_case(size, seed)
    assert_right(run(case, size.K), case, size.K)


@pytest.mark.parametrize("size", [SIZES[1], *SIZES[5:]], ids=str)
def test_with_a_norm(size, seed):
    case = make_case(size, seed)
    assert_right(run(case, size.K, norm=True), case, size.K, norm=True)


def test_norm_eps(seed):
    case = make_case(SIZES[0], seed)
    case = case._replace(x=case.x * 1e-3)
    route = run(case, 2, norm=True, norm_eps=1e-2)
    expected = case.norm_weight * (case.x.astype(jnp.float32) * 10).astype(jnp.bfloat16)
    chex.assert_trees_all_close(route.normed, expected, rtol=2e-2)


def test_options(seed):
    case = make_case(USUAL, seed)
    route = run(case, USUAL.K, norm_topk_prob=False)
    assert_right(route, case, USUAL.K, norm_topk_prob=False)


# --- ties, and what is not finite


@pytest.mark.parametrize(("copies", "E"), [(1, 128), (5, 128), (384, 128), (1, 384), (384, 384)])
def test_ties_take_the_lower_index(copies, E, seed):
    # Small integers: sums are exact in whatever order, so that equal experts tie, and others too.
    x, gate = np.random.default_rng(seed).integers(-2, 3, (2, E, USUAL.H))
    gate = gate[np.arange(E) // copies * copies]
    case = make_case(USUAL, seed)._replace(
        x=jnp.asarray(x[: USUAL.T], jnp.bfloat16), gate=jnp.asarray(gate, jnp.bfloat16)
    )
    K = 7
    route = run(case, K)
    exact = (x[: USUAL.T] @ gate.T).astype(np.float32)
    chex.assert_trees_all_equal(route.logits, exact)
    ids = np.argsort(-exact, axis=1, kind="stable")[:, :K].astype(np.int32)
    chex.assert_trees_all_equal(route.ids, ids)
    assert_right(route, case, K)


def test_zeros_of_either_sign_tie(seed):
    case = make_case(USUAL, seed)
    case = case._replace(x=jnp.zeros_like(case.x).at[0].set(-0.0))
    route = run(case, USUAL.K)
    chex.assert_trees_all_equal(route.ids, jnp.tile(jnp.arange(USUAL.K), (USUAL.T, 1)))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_bad_token_is_nobody_elses_business(value, seed):
    case = make_case(USUAL, seed)
    good = run(case, USUAL.K)
    route = run(case._replace(x=case.x.at[2].set(value)), USUAL.K)
    others = np.delete(np.arange(USUAL.T), 2)
    for name in ("ids", "weights", "logits"):
        assert_same_bits(getattr(route, name)[others], getattr(good, name)[others])
    # Still K different experts, so that whatever takes them holds.
    ids = np.asarray(route.ids[2])
    assert len(set(ids.tolist())) == USUAL.K and ids.min() >= 0 and ids.max() < USUAL.E


# --- bits


@pytest.mark.parametrize("T", BATCHES)
def test_bits_do_not_depend_on_the_batch(T, seed):
    case = make_case(LARGEST_BATCH, seed)
    expected = run(case, LARGEST_BATCH.K, norm=True)
    order = np.random.default_rng(seed).permutation(LARGEST_BATCH.T)
    for start in range(0, LARGEST_BATCH.T - T + 1, T):
        which = order[start : start + T]
        found = run(case._replace(x=case.x[which]), LARGEST_BATCH.K, norm=True)
        assert_same_tokens(found, expected, which)
        assert_same_bits(found.normed, expected.normed[which])


@pytest.mark.skipif(not ON_GPU, reason="interpret mode has no races to lose")
def test_same_input_same_bits(seed):
    case = make_case(LARGEST_BATCH, seed)
    expected = run(case, LARGEST_BATCH.K, norm=True)

    @jax.jit
    def count_different(case, expected):
        def again(index, count):
            # Tied to the index, or the compiler would compute it once for all rounds.
            this_case, _ = lax.optimization_barrier((case, index))
            route = run(this_case, LARGEST_BATCH.K, norm=True)
            pairs = zip(jax.tree.leaves(route), jax.tree.leaves(expected), strict=True)
            return count + sum(jnp.any(bits(a) != bits(b)) for a, b in pairs)

        return lax.fori_loop(0, 1000, again, jnp.int32(0))

    chex.assert_trees_all_equal(count_different(case, expected), jnp.int32(0))


def _flat(route) -> jax.Array:
    return jnp.concatenate([leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(route)])


def test_every_element_is_written(seed):
    case = make_case(USUAL, seed)

    def flat(*case, interpret):
        return _flat(run(Case(*case), USUAL.K, norm=True, interpret=interpret))

    expected = _flat(run(case, USUAL.K, norm=True))
    assert bool(jnp.all(jnp.isfinite(expected)))
    for out in calls_with_poisoned_output(flat, *case):
        assert_same_bits(out, expected)


# --- under JAX's transformations


def test_gradients_are_a_clear_error(seed):
    case = make_case(SIZES[0], seed)
    with pytest.raises(NotImplementedError, match="reference_route_tokens"):
        jax.grad(lambda x: run(case._replace(x=x), 2).weights.sum())(case.x)


def test_jit_and_vmap(seed):
    case = make_case(USUAL, seed)
    expected = run(case, USUAL.K)
    assert_same_tokens(jax.jit(lambda case: run(case, USUAL.K))(case), expected, slice(None))
    batches = case.x.reshape(2, USUAL.T // 2, USUAL.H)
    route = jax.vmap(lambda x: run(case._replace(x=x), USUAL.K))(batches)
    for name in ("ids", "weights", "logits"):
        found = getattr(route, name)
        assert_same_bits(found.reshape(USUAL.T, -1), getattr(expected, name))


# --- what no output shows


@pytest.mark.skipif(ON_GPU, reason="the race detector is interpret mode's")
def test_no_races(seed):
    size = Size(T=5, E=72, K=3, H=128)
    case = make_case(size, seed)
    route = run_and_assert_no_races(
        lambda *case, interpret: run(Case(*case), size.K, norm=True, interpret=interpret), *case
    )
    assert_right(route, case, size.K, norm=True)


@pytest.mark.parametrize("H", [64, 128, 2048, 2112, 2880, 4096, 6144, 8192, 16384])
def test_splits_cover_H_whatever_T_is(H):
    def cut(T, programs):
        work = Work(
            T=T,
            H=H,
            E=128,
            K=8,
            norm_topk_prob=True,
            norm_eps=None,
            num_programs=programs,
        )
        return [
            split * work.pieces + piece
            for split in range(work.splits)
            for piece in range(work.pieces)
            if work.has_piece(split, piece)
        ]

    assert cut(1, 1) == cut(128, 132) == list(range(H // COLUMNS))


@pytest.mark.parametrize(
    ("preset", "T", "norm"),
    [
        ("qwen3_30b_a3b", 8, True),
        # T beyond a tile of 8 rows and no multiple of it.
        ("qwen3_30b_a3b", 9, False),
        pytest.param("qwen3_30b_a3b", 97, True, marks=pytest.mark.slow),
        pytest.param("qwen3_coder_480b", 128, True, marks=pytest.mark.slow),
    ],
)
def test_lowers_for_cuda(preset, T, norm):
    shapes = PRESETS[preset]
    struct = jax.ShapeDtypeStruct
    case = Case(
        x=struct((T, shapes.H), jnp.bfloat16),
        gate=struct((shapes.E, shapes.H), jnp.bfloat16),
        norm_weight=struct((shapes.H,), jnp.bfloat16),
    )

    def function(*case):
        return run(Case(*case), shapes.K, norm=norm, interpret=False)

    text = lower_for_cuda(function, *case)
    assert text.count("custom_call @mosaic_gpu_v2") == 1
    operations = {part.split("(")[0].split(" ")[0] for part in text.split("stablehlo.")[1:]}
    # One launch and nothing around it.
    assert operations <= {"mesh", "custom_call", "constant"}, operations
    [module] = mosaic_modules(text)
    assert module.count("atom.add.acq_rel.gpu") == 1 + norm  # barriers
    # float32 sums must not be added to memory in whatever order they come.
    assert "atomicrmw" not in module and "red.global" not in module
