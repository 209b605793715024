"""Mailboxes: what is posted is collected, what is stale becomes empty, what is missing is found."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.device import launch
from pallas_kernels.mosaic.mailbox import Mailbox, Piece, collect, empty, fresh_mailboxes, post
from pallas_kernels.mosaic.warpgroup import ROWS_BY_64, one_per_lane
from tests.pallas_kernels.machine import INTERPRET, lower_for_cuda, mosaic_modules

EMPTY = 0xFFFFFFFF


def words(array) -> np.ndarray:
    return np.asarray(array).view(np.uint32)


def empty_mailbox(shape):
    return jnp.full(shape, EMPTY, jnp.uint32).view(jnp.float32)


def launch_pair(body, full, stale, out_shape, *inputs, num_blocks=1, interpret=INTERPRET):
    """Runs body(block_id, mailbox, out, *inputs); returns out, full, stale."""
    types = (jax.ShapeDtypeStruct(out_shape, jnp.float32), full, stale)
    out_type = tuple(jax.ShapeDtypeStruct(t.shape, t.dtype) for t in types)

    def kernel(block_id, *refs):
        *given, _, _, out, full_ref, stale_ref = refs
        body(block_id, Mailbox(full_ref, stale_ref), out, *given)

    return launch(
        kernel,
        name="mailbox",
        num_blocks=num_blocks,
        out_type=out_type,
        in_place={len(inputs): 1, len(inputs) + 1: 2},
        interpret=interpret,
    )(*inputs, full, stale)


def first_posts_second_collects(block_id, mailbox, out, x, *, limit):
    """Block 0 posts rows of x; block 1 collects them."""

    def do_post():
        value = plgpu.load(x, layout=ROWS_BY_64, optimized=False)
        post(mailbox, value, ROWS_BY_64, limit=limit)

    def do_collect():
        (value,) = collect([Piece(mailbox, ROWS_BY_64, limit=limit)])
        out[...] = value

    jax.lax.cond(block_id == 0, do_post, do_collect)


@pytest.mark.parametrize("limit", [None, 3])
def test_what_is_posted_is_collected_and_the_rest_stays_empty(limit):
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    x[1, 5], x[2, 7] = np.nan, np.inf  # a NaN is a value like any other
    used = jnp.asarray(x + 1)
    body = functools.partial(first_posts_second_collects, limit=limit)
    out, full, stale = launch_pair(
        body, empty_mailbox((8, 64)), used, (8, 64), jnp.asarray(x), num_blocks=2
    )
    there = 8 if limit is None else limit
    np.testing.assert_array_equal(out[:there], x[:there])
    np.testing.assert_array_equal(out[there:], 0)
    np.testing.assert_array_equal(words(full)[there:], EMPTY)
    np.testing.assert_array_equal(words(stale)[:there], EMPTY)
    np.testing.assert_array_equal(stale[there:], used[there:])


def test_a_word_that_would_be_empty_becomes_another_nan():
    x = np.full((128,), EMPTY, np.uint32).view(np.float32)

    def body(block_id, mailbox, out, x):
        del block_id, out
        post(mailbox, plgpu.load(x, layout=one_per_lane(128)), one_per_lane(128))

    _, full, _ = launch_pair(body, empty_mailbox((128,)), empty_mailbox((128,)), (8,), x)
    assert np.isnan(np.asarray(full)).all() and (words(full) != EMPTY).all()


def test_a_shorter_row_is_filled_up_with_zeros():
    """40 elements of a row in 128 lanes, a scalar beside them, and what is there already."""
    row = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)

    def body(block_id, mailbox, out, given):
        del block_id
        pieces = [
            Piece(mailbox.at[1], one_per_lane(128), shape=(128,), limit=40),
            Piece(given.at[0, 3], None),
        ]
        value, scalar = collect(pieces)
        out[...] = value * scalar

    out, _, _ = launch_pair(body, jnp.asarray(row), empty_mailbox((2, 40)), (128,), row)
    np.testing.assert_allclose(out[:40], row[1] * row[0, 3], rtol=1e-6)
    np.testing.assert_array_equal(out[40:], 0)


def test_where_nothing_is_posted_is_emptied_too():
    def body(block_id, mailbox, out):
        del block_id, out
        empty(mailbox.at[1], (128,), one_per_lane(128))

    used = jnp.ones((2, 128))
    _, full, stale = launch_pair(body, used, used, (8,))
    np.testing.assert_array_equal(words(stale)[1], EMPTY)
    np.testing.assert_array_equal(stale[0], 1)
    np.testing.assert_array_equal(full, 1)


@pytest.mark.skipif(not INTERPRET, reason="a GPU would hang")
def test_what_is_missing_is_found():
    def body(block_id, mailbox, out):
        del block_id
        (out[...],) = collect([Piece(mailbox, one_per_lane(128))])

    try:
        with pytest.raises(Exception, match="collects what no block has posted"):
            jax.block_until_ready(
                launch_pair(body, empty_mailbox((128,)), empty_mailbox((128,)), (128,))
            )
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


def test_fresh_ones_are_empty():
    shapes = {"some": (3, 8, 64), "few": (7,)}
    found = fresh_mailboxes(shapes, INTERPRET)
    for name, pair in found.items():
        for array in pair:
            assert array.shape == shapes[name] and (words(array) == EMPTY).all()


def test_lowers_to_loads_that_are_repeated(monkeypatch):
    body = functools.partial(first_posts_second_collects, limit=3)
    struct = jax.ShapeDtypeStruct((8, 64), jnp.float32)

    def run(full, stale, x):
        return launch_pair(body, full, stale, (8, 64), x, num_blocks=2, interpret=False)

    [module] = mosaic_modules(lower_for_cuda(run, struct, struct, struct))
    assert "ld.relaxed.gpu.global.v4.b32" in module and "bra again" in module
    assert module.count("st.relaxed.gpu.global.v4.b32") == 2  # the value, and empty words
    assert "trap" not in module
    monkeypatch.setenv("PALLAS_KERNELS_SPIN_TIMEOUT_S", "5")
    [module] = mosaic_modules(lower_for_cuda(lambda *a: run(*a), struct, struct, struct))
    assert "trap" in module
