"""The kernel against its plain twin, and what must hold for its bits."""

import operator
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_experts.shapes import SHAPES
from pallas_kernels.mosaic.device import launch
from pallas_kernels.router import Route, route_tokens
from pallas_kernels.router.kernel import SplitLogits, TokenNorm
from pallas_kernels.router.top_k import TopK
from tests.pallas_kernels.decode_experts.cases import assert_same_bits, bits
from tests.pallas_kernels.machine import (
    INTERPRET,
    ON_GPU,
    calls_with_poisoned_output,
    lower_for_cuda,
    mosaic_modules,
)
from tests.pallas_kernels.races import run_and_assert_no_races
from tests.pallas_kernels.router.cases import Case, Size, assert_right, best_experts, make_case

# In interpret mode a shape that is new costs a second and a half, so the tests share few of them.
USUAL = Size(T=8, E=128, K=8, H=128)
# Tokens beyond a tile of 8; three blocks of experts, the last not whole, ranked by rounds; 33 times
# 64 columns, so that the last split is shorter.
UNEVEN = Size(T=9, E=136, K=3, H=2112)
SIZES = [UNEVEN]  # USUAL is in test_ties_take_the_lower_index
SIZES_WITH_A_NORM = [USUAL]
if ON_GPU:
    SIZES += [
        Size(T=1, E=8, K=2, H=64),
        Size(T=3, E=8, K=8, H=192),
        Size(T=3, E=64, K=2, H=128),
        Size(T=17, E=128, K=8, H=192),
        Size(T=2, E=512, K=3, H=64),
        Size(T=33, E=512, K=32, H=64),
        Size(T=5, E=16, K=3, H=2112),
        Size(T=1, E=128, K=8, H=2048),
        Size(T=8, E=128, K=8, H=2048),
        Size(T=64, E=128, K=8, H=2048),
        Size(T=128, E=128, K=8, H=4096),
        Size(T=128, E=160, K=8, H=6144),
        Size(T=128, E=512, K=10, H=2048),
        Size(T=128, E=512, K=8, H=16384),  # as much shared memory as the kernel takes
    ]
    SIZES_WITH_A_NORM += SIZES
# Batches whose tokens are those of the largest. In interpret mode all have 8 columns: a CPU's
# matrix product adds in another order if it is wider.
BATCHES = [1, 2, 8, 9, 33, 64, 97] if ON_GPU else [1]
LARGEST_BATCH = Size(T=128, E=128, K=8, H=2048) if ON_GPU else USUAL

WITH_A_NORM = {"norm_eps": 1e-4, "norm_topk_prob": False}

# All that no block has written is NaN, so that an element that stays unwritten shows.
POISONED = plgpu.InterpretGPUParams(uninitialized_memory="nan") if INTERPRET else False


def run(case: Case, K: int, *, norm_eps: float | None = None, **keywords) -> Route:
    keywords = {"interpret": POISONED} | keywords
    if norm_eps is not None:
        keywords |= {"norm_weight": case.norm_weight, "norm_eps": norm_eps}
    return route_tokens(case.x, case.gate, K=K, **keywords)


def assert_same_tokens(found: Route, expected: Route, which=slice(None)) -> None:
    """Found's tokens have the bits of expected's tokens `which`."""

    def bytes_of(array) -> np.ndarray:
        return np.ascontiguousarray(array).view(np.uint8)

    expected = jax.tree.map(lambda array: np.asarray(array)[which], expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(jax.tree.map(bytes_of, found), jax.tree.map(bytes_of, expected))


# --- right on fresh inputs


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_reference(size, seed):
    case = make_case(size, seed)
    assert_right(run(case, size.K), case, size.K)


@pytest.mark.parametrize("size", SIZES_WITH_A_NORM, ids=str)
def test_with_a_norm(size, seed):
    case = make_case(size, seed)
    # Values so small that another norm_eps would show.
    case = case._replace(x=case.x * jnp.bfloat16(2**-6))
    assert_right(run(case, size.K, **WITH_A_NORM), case, size.K, **WITH_A_NORM)


# --- ties, and what is not finite


@pytest.mark.parametrize(("copies", "size"), [(5, USUAL), (5, UNEVEN), (384, UNEVEN)])
def test_ties_take_the_lower_index(copies, size, seed):
    # Small integers: sums are exact in whatever order, so that equal experts tie, and others too.
    x, gate = np.random.default_rng(seed).integers(-2, 3, (2, size.E, size.H))
    x, gate = x[: size.T], gate[np.arange(size.E) // copies * copies]
    case = Case(jnp.asarray(x, jnp.bfloat16), jnp.asarray(gate, jnp.bfloat16), None)
    route = run(case, size.K)
    exact = (x @ gate.T).astype(np.float32)
    chex.assert_trees_all_equal(np.asarray(route.logits), exact)
    chex.assert_trees_all_equal(np.asarray(route.ids), best_experts(exact, size.K))
    assert_right(route, case, size.K)


def test_zeros_of_either_sign_tie(seed):
    case = make_case(USUAL, seed)
    zeros = np.zeros((USUAL.T, USUAL.H), jnp.bfloat16)
    zeros[0] = -0.0
    route = run(case._replace(x=jnp.asarray(zeros)), USUAL.K)
    assert route.ids.tolist() == [list(range(USUAL.K))] * USUAL.T


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_a_bad_token_changes_no_other(seed):
    case = make_case(USUAL, seed)
    good = run(case, USUAL.K)
    x = np.array(case.x)
    bad, others = [2, 5], [0, 1, 3, 4, 6, 7]
    x[bad] = [[np.nan], [np.inf]]
    route = run(case._replace(x=jnp.asarray(x)), USUAL.K)
    assert_same_tokens(jax.tree.map(lambda a: np.asarray(a)[others], route), good, others)
    # Still K different experts, because what indexes with them must hold.
    for ids in np.asarray(route.ids)[bad]:
        assert len(set(ids.tolist())) == USUAL.K and ids.min() >= 0 and ids.max() < USUAL.E


# --- bits


@pytest.mark.parametrize("T", BATCHES)
def test_bits_do_not_depend_on_the_batch(T, seed):
    case, K = make_case(LARGEST_BATCH, seed), LARGEST_BATCH.K
    expected = run(case, K, **WITH_A_NORM)
    x, order = np.asarray(case.x), np.random.default_rng(seed).permutation(LARGEST_BATCH.T)
    for start in range(0, LARGEST_BATCH.T - T + 1, T):
        which = order[start : start + T]
        found = run(case._replace(x=jnp.asarray(x[which])), K, **WITH_A_NORM)
        assert_same_tokens(found, expected, which)


@pytest.mark.skipif(not ON_GPU, reason="interpret mode has no races to lose")
def test_same_input_same_bits(seed):
    case = make_case(LARGEST_BATCH, seed)
    expected = run(case, LARGEST_BATCH.K, norm_eps=1e-6)

    @jax.jit
    def count_different(case, expected):
        def again(index, count):
            # Tied to the index, or the compiler would compute it once for all rounds.
            this_case, _ = lax.optimization_barrier((case, index))
            route = run(this_case, LARGEST_BATCH.K, norm_eps=1e-6)
            pairs = zip(jax.tree.leaves(route), jax.tree.leaves(expected), strict=True)
            return count + sum(jnp.any(bits(a) != bits(b)) for a, b in pairs)

        return lax.fori_loop(0, 1000, again, jnp.int32(0))

    chex.assert_trees_all_equal(count_different(case, expected), jnp.int32(0))


def _flat(route) -> jax.Array:
    return jnp.concatenate([leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(route)])


@pytest.mark.skipif(not ON_GPU, reason="interpreted, every test here has poisoned memory")
def test_every_element_is_written(seed):
    case = make_case(USUAL, seed)

    def flat(*case, interpret):
        return _flat(run(Case(*case), USUAL.K, norm_eps=1e-6, interpret=interpret))

    expected = flat(*case, interpret=False)
    assert bool(jnp.all(jnp.isfinite(expected)))
    for out in calls_with_poisoned_output(flat, *case):
        assert_same_bits(out, expected)


def test_K_may_be_a_numpy_integer(seed):
    case = make_case(USUAL, seed)
    assert jax.eval_shape(lambda: run(case, np.int64(5))).ids.shape == (USUAL.T, 5)


# --- under JAX's transformations


def test_gradients_are_a_clear_error(seed):
    case = make_case(USUAL, seed)
    with pytest.raises(NotImplementedError, match="reference_route_tokens"):
        jax.grad(lambda x: run(case._replace(x=x), 2).weights.sum())(case.x)


def test_vmap_of_jit(seed):
    T, _, K, H = USUAL
    case = make_case(USUAL._replace(T=2 * T), seed)
    batches = case.x.reshape(2, T, H)
    routes = jax.vmap(jax.jit(lambda x: run(case._replace(x=x), K)))(batches)
    for index in range(2):
        expected = run(case._replace(x=batches[index]), K)
        assert_same_tokens(jax.tree.map(operator.itemgetter(index), routes), expected)


# --- what no output shows


def launch_one_by_one(x, gate, norm_weight, *, K: int, norm_eps: float, interpret) -> Route:
    """route_tokens with each kind of block on its own launch.

    The race detector takes the blocks of a grid for concurrent and does not see counters.
    """
    (T, H), E = x.shape, gate.shape[0]
    norm, product = TokenNorm(T=T, H=H, eps=norm_eps), SplitLogits(T=T, H=H, E=E)
    top_k = TopK(E=E, K=K, num_splits=product.num_splits, norm_topk_prob=True)

    def launch_kind(kind, num_blocks, out_type, scratch_types=()):
        return launch(
            kind.run,
            name=type(kind).__name__,
            num_blocks=num_blocks,
            out_type=out_type,
            scratch_types=scratch_types,
            interpret=interpret,
        )

    normed = launch_kind(norm, T, norm.out_type)(x, norm_weight)
    partials = launch_kind(
        product,
        product.num_blocks,
        product.out_type,
        {"stages": product.stage_types(), "full": product.full_type()},
    )(gate, normed)
    logits, ids, weights = launch_kind(
        top_k, T, top_k.out_types(T), {"shared": top_k.shared_types()}
    )(partials)
    return Route(ids=ids, weights=weights, logits=logits, normed=normed)


@pytest.mark.skipif(ON_GPU, reason="the race detector is interpret mode's")
def test_no_kind_of_block_races(seed):
    size = Size(T=3, E=72, K=3, H=128)
    case = make_case(size, seed)
    route = run_and_assert_no_races(launch_one_by_one, *case, K=size.K, norm_eps=1e-6)
    assert_right(route, case, size.K, norm_eps=1e-6)


@pytest.mark.parametrize("H", [64, 128, 2048, 2112, 2880, 4096, 6144, 8192, 16384])
def test_splits_cover_H_whatever_T_is(H):
    product, wide = (SplitLogits(T=T, H=H, E=128) for T in (1, 128))
    assert (product.num_splits, product.num_stages) == (wide.num_splits, wide.num_stages)
    columns = 64 * product.num_stages
    # All of H, and no split that has nothing of it.
    assert (product.num_splits - 1) * columns < H <= product.num_splits * columns


@pytest.mark.parametrize(
    ("preset", "T", "norm"),
    [
        # T beyond a tile of 8 rows and no multiple of it.
        ("qwen3_30b_a3b", 9, True),
        pytest.param("qwen3_30b_a3b", 1, False, marks=pytest.mark.slow),
        pytest.param("qwen3_30b_a3b", 8, False, marks=pytest.mark.slow),
        pytest.param("qwen3_30b_a3b", 9, False, marks=pytest.mark.slow),
        pytest.param("qwen3_30b_a3b", 33, True, marks=pytest.mark.slow),
        pytest.param("qwen3_30b_a3b", 97, True, marks=pytest.mark.slow),
        pytest.param("qwen3_coder_480b", 128, True, marks=pytest.mark.slow),
    ],
)
def test_lowers_for_cuda(preset, T, norm):
    shapes = SHAPES[preset]
    struct = jax.ShapeDtypeStruct
    case = Case(
        x=struct((T, shapes.H), jnp.bfloat16),
        gate=struct((shapes.E, shapes.H), jnp.bfloat16),
        norm_weight=struct((shapes.H,), jnp.bfloat16),
    )

    def function(*case):
        return run(Case(*case), shapes.K, norm_eps=1e-6 if norm else None, interpret=False)

    text = lower_for_cuda(function, *case)
    assert text.count("custom_call @mosaic_gpu_v2") == 1
    operations = {part.split("(")[0].split(" ")[0] for part in text.split("stablehlo.")[1:]}
    # One launch and nothing around it.
    assert operations <= {"mesh", "custom_call", "constant"}, operations
    [module] = mosaic_modules(text)
    # Signals and waits, and no float32 sum that is added to memory in whatever order they come.
    added = re.findall(r"\b(?:red|atom)\.[\w.:]+", module)
    once = ["red.add.release.gpu.global.u32", "atom.add.relaxed.gpu.global.u32"]
    assert sorted(added) == sorted(once * (1 + norm))
    assert "atomicrmw" not in module
