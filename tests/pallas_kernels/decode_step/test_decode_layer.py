"""A whole layer against its reference, and what must hold for its bits; larger sizes on a GPU.

In interpret mode a shape or a way to launch that is new costs six seconds, and a layer one or two.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from pallas_kernels.decode_step import Residual, decode_layers
from pallas_kernels.decode_step.layer import LayerConfig
from tests.pallas_kernels.decode_experts.cases import assert_same_bits
from tests.pallas_kernels.decode_step.cases import (
    POISONED,
    Case,
    assert_right,
    assert_same_rows,
    layer_shapes,
    make_case,
    one_row,
    qwen3_shapes,
    run,
)
from tests.pallas_kernels.machine import ON_GPU, calls_with_poisoned_output, examples

SMALL = layer_shapes(3)
# No token yet; a ring that has wrapped, into its second chunk; one that is about to.
LENGTHS = (0, 3 * SMALL.C + 70, SMALL.C)


@pytest.fixture(scope="module")
def small():
    """A case of three rows with parts, and its step."""
    case = make_case(SMALL, LENGTHS, seed=0, num_parts=2)
    return case, run(case, SMALL)


@pytest.fixture(scope="module")
def alone(small):
    """The second row's case, and its step."""
    case = one_row(small[0], 1)
    # Interpreted, another block is a product of another shape, which a CPU adds in another order.
    config = None if ON_GPU else LayerConfig()
    return case, run(case, layer_shapes(1), config=config)


def test_matches_reference(small):
    assert_right(small[1], small[0], SMALL)


def test_the_total_is_what_the_next_layer_adds(small):
    _, step = small
    x, parts, _ = step.residual
    expected = x[:3].astype(jnp.float32)
    for part in parts:
        expected += part[:3]
    total = step.residual.total(jnp.ones(3, jnp.int32))
    assert_same_bits(total, expected.astype(jnp.bfloat16))
    # A row that is not valid has no parts, whatever lies there.
    total = Residual(x, parts.at[:, 1].set(jnp.nan)).total(jnp.array([1, 0, 1]))
    assert_same_bits(
        total, jnp.where(jnp.array([1, 0, 1])[:, None], expected, x[:3]).astype(x.dtype)
    )


def test_a_row_that_is_not_valid_appends_nothing_and_changes_no_other(small):
    case, before = small
    row, others = 1, [0, 2]
    x, parts, _ = case.residual
    residual = Residual(x.at[row].set(jnp.nan), parts.at[:, row].set(jnp.nan))
    positions = case.positions._replace(valid=jnp.array([1, 0, 1], jnp.int32))
    case = case._replace(residual=residual, positions=positions)
    step = run(case, SMALL)
    assert_right(step, case, SMALL)  # its ids are -1, and its cache is as it was
    assert_same_rows(step, others, before)


def test_a_row_has_the_same_bits_alone(small, alone):
    assert_right(alone[1], alone[0], layer_shapes(1))
    assert_same_rows(alone[1], [0], small[1], [1])


def test_two_launches_and_another_config_have_the_bits_of_one(alone):
    case, step = alone
    changes = {"gate_up_num_stages": 3, "down_num_stages": 2}
    if ON_GPU:
        changes |= {"gate_up_block_k": 64, "down_block_k": 64, "down_block_m": 128}
    config = dataclasses.replace(LayerConfig(), **changes)
    assert_same_rows(run(case, layer_shapes(1), launches="blocks", config=config), [0], step)


def test_mailboxes_go_from_layer_to_layer(alone):
    """Each launch finds empty what the one before has filled; the bits are as with fresh ones."""
    case, step = alone
    expected = step
    for _ in range(3 if ON_GPU else 1):
        residual = case.residual._replace(mailboxes=step.residual.mailboxes)
        step = run(
            case._replace(residual=residual),
            layer_shapes(1),
            config=None if ON_GPU else LayerConfig(),
        )
        assert_same_rows(step, [0], expected)
    for next_full, next_stale in step.residual.mailboxes.values():
        assert (np.asarray(next_full).view(np.uint32) == 0xFFFFFFFF).all()
        assert not (np.asarray(next_stale).view(np.uint32) == 0xFFFFFFFF).all()


def test_several_layers_are_one_after_the_other(alone):
    """Without parts zeros are added, which change no bit."""
    case, _ = alone
    s, config = layer_shapes(1), None if ON_GPU else LayerConfig()
    x, parts = case.residual.x, jnp.zeros_like(case.residual.parts)
    given = case._replace(residual=Residual(x, parts))
    expected = [run(given, s, config=config)]
    expected.append(run(case._replace(residual=expected[0].residual), s, config=config))
    found = decode_layers(
        Residual(x),
        [case.weights] * 2,
        [(case.keys, case.values)] * 2,
        case.positions,
        K=s.K,
        eps=s.eps,
        config=config,
        interpret=POISONED,
    )
    for step, other in zip(found, expected, strict=True):
        assert_same_rows(step, [0], other)


# --- any batch; each shape that is new would cost seconds


@given(data=st.data())
@examples(on_cpu=3, on_gpu=50)
def test_any_batch(data):
    s = layer_shapes(data.draw(st.sampled_from([1, 3])))
    rows = {"min_size": s.B, "max_size": s.B}
    lengths = data.draw(st.lists(st.integers(0, 4 * s.C), **rows))
    valid = data.draw(st.lists(st.integers(0, 1), **rows))
    seed = data.draw(st.integers(0, 2**32 - 1))
    case = make_case(s, lengths, seed, valid=valid, num_parts=2)
    assert_right(run(case, s), case, s)


def test_more_rows_than_one_tile_of_tokens(seed):
    """The experts are launches of their own; nothing was to be added to x."""
    s = layer_shapes(9, heads=2, C=64, E=8, norm_topk_prob=False)
    lengths, valid = [*range(0, 72, 9), 200], [1, 1, 0, 1, 1, 1, 1, 1, 1]
    case = make_case(s, lengths, seed, valid=valid)
    assert_right(run(case, s), case, s)


@pytest.mark.slow
@pytest.mark.parametrize("kv", [2, 4])
def test_several_kv_heads(kv, seed):
    s = layer_shapes(2, kv=kv, H=192)
    case = make_case(s, [5, 150], seed, num_parts=1)
    assert_right(run(case, s, launches="blocks"), case, s)


# --- Qwen3-30B-A3B's sizes

on_gpu = pytest.mark.skipif(not ON_GPU, reason="takes hours in interpret mode")


@on_gpu
@pytest.mark.parametrize("num_parts", [0, 8])
@pytest.mark.parametrize(
    ("B", "C", "lengths"),
    [
        (1, 512, [0]),
        (1, 512, [511]),
        (1, 16384, [16383]),
        (1, 16384, [16384]),
        (2, 512, [1, 700]),
        (2, 16384, [16000, 3]),
        (5, 1088, [0, 1, 64, 1000, 5000]),
        (8, 512, [505, 506, 507, 508, 509, 510, 511, 512]),
        (8, 16384, [0, 1, 100, 1000, 4096, 8191, 16383, 40000]),
        (9, 1024, range(0, 1125, 125)),
        (33, 4096, range(0, 4290, 130)),
        (64, 512, [500] * 64),
        (64, 4096, range(0, 4480, 70)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_real_sizes(B, C, lengths, num_parts, seed):
    s = qwen3_shapes(B, C)
    valid = np.ones(B, np.int32)
    valid[4::7] = 0
    case = make_case(s, list(lengths), seed, valid=valid, num_parts=num_parts)
    step = run(case, s)
    assert_right(step, case, s)
    assert_same_rows(run(case, s, launches="blocks"), np.flatnonzero(valid), step)


@on_gpu
@pytest.mark.parametrize("B", [1, 2, 5, 8])
def test_real_rows_have_the_same_bits_in_every_batch_up_to_eight(B, seed):
    s = qwen3_shapes(8, 2048)
    case = make_case(s, [0, 63, 64, 500, 2047, 2048, 5000, 1], seed, num_parts=8)
    together = run(case, s)
    order = np.random.default_rng(seed).permutation(8)
    for start in range(0, 8 - B + 1, B):
        rows = order[start : start + B]
        assert_same_rows(
            run(_some_rows(case, rows), qwen3_shapes(B, 2048)), range(B), together, rows
        )


def _some_rows(case: Case, rows: np.ndarray) -> Case:
    ones = [one_row(case, row) for row in rows]
    first = [one.residual.x[:1] for one in ones], [one.residual.parts[:, :1] for one in ones]
    padding = [(0, 0), (0, 8 - len(rows)), (0, 0)]
    x = jnp.pad(jnp.concatenate(first[0]), padding[1:], constant_values=jnp.nan)
    parts = jnp.pad(jnp.concatenate(first[1], axis=1), padding, constant_values=jnp.nan)
    return case._replace(
        residual=Residual(x, parts),
        keys=case.keys[rows],
        values=case.values[rows],
        positions=jax.tree.map(lambda array: array[rows], case.positions),
    )


@on_gpu
@pytest.mark.parametrize(
    "changes",
    [
        *({"gate_up_block_k": block_k, "gate_up_num_stages": 2} for block_k in (64, 128, 256)),
        *({"down_block_k": block_k} for block_k in (64, 256)),
        {"gate_up_neurons": 16},
        {"gate_up_neurons": 16, "gate_up_block_k": 128, "gate_up_num_stages": 4},
        {"gate_up_neurons": 64, "gate_up_block_k": 64, "down_block_m": 256, "down_num_stages": 2},
        {"down_num_stages": 2, "down_block_m": 128},
        {"qkv_spread_ns": 0, "o_spread_ns": 9000},
        {"mailboxes": False},
    ],
    ids=str,
)
def test_real_sizes_have_the_same_bits_in_every_config(changes, seed):
    s = qwen3_shapes(4)
    case = make_case(s, [500, 0, 1000, 77], seed, num_parts=8)
    expected = run(case, s, config=LayerConfig())
    found = run(case, s, config=dataclasses.replace(LayerConfig(), **changes))
    assert_same_rows(found, range(4), expected)


@on_gpu
@pytest.mark.parametrize("B", [1, 5, 8, 64])
def test_same_input_same_bits(B, seed):
    s = qwen3_shapes(B)
    case = make_case(s, np.random.default_rng(seed).integers(0, 600, B), seed, num_parts=8)

    def known(step):
        """All that is written: rows from B on may hold anything."""
        x, parts, _ = step.residual
        return (x[:B], parts[:, :B], *step[1:])

    expected = known(run(case, s))

    @jax.jit
    def count_different(case, expected):
        def again(index, count):
            # Tied to the index, or the compiler would compute it once for all rounds.
            this_case, _ = lax.optimization_barrier((case, index))
            pairs = zip(known(run(this_case, s)), expected, strict=True)
            return count + sum(jnp.any(_bits(a) != _bits(b)) for a, b in pairs)

        return lax.fori_loop(0, 1000, again, jnp.int32(0))

    assert count_different(case, expected) == 0


def _bits(array: jax.Array) -> jax.Array:
    return array.view({2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize])


@on_gpu
@pytest.mark.parametrize("B", [3, 8, 12])
def test_every_element_is_written(B, seed):
    """Whatever lay in memory before: of rows that are valid no element is left as it was."""
    s = qwen3_shapes(B, 64)
    case = make_case(s, [64] * B, seed, num_parts=8)  # every slot is stored
    leaves, tree = jax.tree.flatten(case)

    def flat(*leaves, interpret):
        step = run(jax.tree.unflatten(tree, leaves), s, interpret=interpret)
        x, parts, _ = step.residual
        arrays = (x[:B], parts[:, :B], *step[1:])
        return jnp.concatenate([array.astype(jnp.float32).ravel() for array in arrays])

    expected = jax.jit(lambda *leaves: flat(*leaves, interpret=False))(*leaves)
    assert bool(jnp.all(jnp.isfinite(expected)))
    for out in calls_with_poisoned_output(flat, *leaves):
        assert_same_bits(out, expected)


@on_gpu
def test_a_donated_cache_stays_where_it_is(seed):
    s = qwen3_shapes(2)
    case = make_case(s, [100, 400], seed)
    expected = run(case, s)
    step = jax.jit(
        lambda keys, values, case: run(case._replace(keys=keys, values=values), s),
        donate_argnums=(0, 1),
    )
    keys, values = jnp.copy(case.keys), jnp.copy(case.values)
    places = [cache.unsafe_buffer_pointer() for cache in (keys, values)]
    found = step(keys, values, case._replace(keys=None, values=None))
    assert [cache.unsafe_buffer_pointer() for cache in (found.keys, found.values)] == places
    assert_same_rows(found, range(2), expected)
