"""Counters and waits: interpreted, as they are lowered, and as a GPU runs them."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.mosaic import gpu as mgpu

from pallas_kernels.decode_experts import decode_experts
from pallas_kernels.mosaic import grid_sync
from pallas_kernels.mosaic.device import core_count, launch
from tests.pallas_kernels.decode_experts.cases import Size, struct_case
from tests.pallas_kernels.machine import INTERPRET, ON_GPU, lower_for_cuda, mosaic_modules

_CORES = 132


@pytest.mark.parametrize("count", [1, 64])
def test_counters_start_at_zero_and_are_like_no_other_constant(count):
    # XLA keeps constants of the same bytes once for all programs, and kernels write to these.
    counters = np.asarray(grid_sync.zeroed_counters(count))
    assert counters.dtype == np.int32
    assert not counters[:count].any()
    assert len(set(counters[count:].tolist())) > 8


def test_a_program_holds_them_as_a_constant():
    size = Size(T=2, E=4, K=2, H=64, I=64)

    def layer(*arguments):
        return decode_experts(*arguments, layout="expert_major")

    words = np.asarray(grid_sync.zeroed_counters(size.T * size.K)).tolist()
    text = lower_for_cuda(layer, *struct_case(size))
    assert f"stablehlo.constant dense<[{', '.join(map(str, words))}]>" in text


# --- the order of blocks, which `wait` relies on


def run_in_turn(num_blocks: int, waits_for, interpret=INTERPRET) -> jax.Array:
    """[num_blocks]: each block's number plus what the block it waits for has written.

    Args:
      num_blocks: blocks 1 and later wait for one signal each.
      waits_for: block_id -> the block that it waits for.
      interpret: as in launch.
    """

    def kernel(block_id, counters, sums):
        before = jnp.int32(0)

        def wait_and_load():
            grid_sync.wait(counters, waits_for(block_id), 1, 1)
            return sums[waits_for(block_id)]

        before = lax.cond(block_id > 0, wait_and_load, lambda: jnp.int32(0))
        sums[block_id] = block_id + before
        grid_sync.signal(counters, block_id)

    return launch(
        kernel,
        name="run_in_turn",
        num_blocks=num_blocks,
        out_type=jax.ShapeDtypeStruct((num_blocks,), jnp.int32),
        interpret=interpret,
    )(grid_sync.zeroed_counters(num_blocks))


@pytest.mark.skipif(ON_GPU, reason="the last block's counter is not waited for, so not reset")
def test_interpreted_blocks_run_in_the_order_of_their_numbers():
    """Fails if a jax release runs them in another order: then no fused grid can be interpreted."""
    sums = run_in_turn(6, lambda block_id: jnp.maximum(block_id - 1, 0))
    assert sums.tolist() == np.cumsum(range(6)).tolist()


@pytest.mark.skipif(ON_GPU, reason="a GPU would hang")
def test_interpreted_a_wait_for_a_later_block_is_an_error():
    try:
        with pytest.raises(Exception, match=r"waits for counter 2, where 0 of 1 blocks have"):
            jax.block_until_ready(run_in_turn(3, lambda block_id: block_id + 1))
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


# --- as they are lowered


def module_of(use) -> str:
    """A kernel that uses three counters, and then writes something, as it is lowered."""

    def kernel(block_id, counters_gmem, out_gmem):
        use(counters_gmem, block_id)
        out_gmem[0] = jnp.int32(1)

    def function():
        return launch(
            kernel,
            name="assembly",
            num_blocks=3,
            out_type=jax.ShapeDtypeStruct((1,), jnp.int32),
            interpret=False,
        )(grid_sync.zeroed_counters(3))

    [module] = mosaic_modules(lower_for_cuda(function))
    return re.sub(r"assembly_\d+", "assembly", module)


def assembly_of(use) -> list[str]:
    """The inline assembly of such a kernel."""
    return re.findall(r'asm_string = "(.*?)", constraints', module_of(use))


def test_a_signal_comes_after_what_the_block_has_written():
    _, meeting, one_lane = assembly_of(grid_sync.signal)
    assert meeting.startswith("bar.sync")
    assert "red.add.release.gpu" in one_lane and "fence" not in one_lane


def _wait(counters, block_id):
    grid_sync.wait(counters, block_id, 5, 4)


def test_a_wait_lets_the_block_copy_and_the_last_one_resets():
    _, one_lane, meeting, count = assembly_of(_wait)
    assert "waiting, now, 5;" in one_lane and "trap" not in one_lane
    assert one_lane.index("ld.acquire.gpu") < one_lane.index("fence.proxy.async")
    assert meeting.startswith("bar.sync")
    # 5 have signalled and 4 have waited: the last of these finds 8.
    assert "last, before, 8, counts;" in count and "@last st.relaxed" in count


def test_asked_to_a_wait_ends_with_a_trap(monkeypatch):
    monkeypatch.setenv(grid_sync.TIMEOUT_VARIABLE, "2.5")
    _, spin, *_, trap, _, count = assembly_of(_wait)
    assert "waiting, time, 2500000000;" in spin and "ld.acquire.gpu" in spin
    assert trap == "trap;"
    assert "last, before, 8, counts;" in count


def _all_uses(counters, block_id):
    _wait(counters, block_id)
    grid_sync.pause(700)
    grid_sync.signal(counters, block_id)


def test_what_another_thread_lowers_meanwhile_is_the_same(monkeypatch):
    """Fails where one thread's "by one lane" is a state of the process: others would do without."""
    alone = module_of(_all_uses)
    assert alone.count("elect.sync") >= 3
    inside, go_on = threading.Event(), threading.Event()
    inline_ptx = mgpu.utils.inline_ptx

    def inline_and_stop(ptx, *operands, **options):
        if "red.add" in ptx and not inside.is_set():
            inside.set()
            assert go_on.wait(60)
        return inline_ptx(ptx, *operands, **options)

    monkeypatch.setattr(mgpu.utils, "inline_ptx", inline_and_stop)
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(module_of, _all_uses)
        try:
            assert inside.wait(60)
            meanwhile = module_of(_all_uses)
        finally:
            go_on.set()
    assert meanwhile == alone
    assert stopped.result() == alone


# --- a pause, and a staggered start


def test_a_pause_is_a_loop_that_sleeps():
    asked = assembly_of(lambda counters, block_id: grid_sync.pause(700))
    [sleep] = [assembly for assembly in asked if "nanosleep" in assembly]
    assert "@waiting bra again;" in sleep
    # All lanes go on together.
    assert asked[asked.index(sleep) + 1].startswith("bar.sync")


@pytest.mark.skipif(ON_GPU, reason="the interpreter's own")
def test_interpreted_a_pause_is_over_at_once():
    def kernel(block_id, out):
        grid_sync.pause(10**9)
        out[0] = block_id + 7

    out_type = jax.ShapeDtypeStruct((1,), jnp.int32)
    paused = launch(kernel, name="paused", num_blocks=1, out_type=out_type, interpret=True)()
    assert paused.tolist() == [7]


def _numbers(num_blocks: int, bytes_read: int, interpret=False) -> jax.Array:
    """[num_blocks, 128]: each block's number, written once it has begun."""

    def kernel(block_id, out):
        grid_sync.staggered_start(block_id, num_blocks, bytes_read)
        out[block_id] = lax.broadcast_in_dim(block_id, (128,), ())

    return launch(
        kernel,
        name="staggered",
        num_blocks=num_blocks,
        out_type=jax.ShapeDtypeStruct((num_blocks, 128), jnp.int32),
        interpret=interpret,
    )()


# 48 KB take 2 us at a core's share of memory's rate: the pause is half of that.
@pytest.mark.parametrize(("num_blocks", "waits"), [(4 * _CORES - 1, []), (4 * _CORES, [1_000])])
def test_the_second_block_waits_where_more_blocks_follow(num_blocks, waits):
    [module] = mosaic_modules(lower_for_cuda(lambda: _numbers(num_blocks, bytes_read=48_000)))
    pauses = re.findall(r"(%\d+) = .*arith\.constant.*value = (\d+) : i32", module)
    asked = [int(ns) for _, ns in pauses if int(ns) == 1_000]
    assert ("nanosleep" in module) == bool(waits)
    assert asked[:1] == waits


@pytest.mark.parametrize("waves", [1, 5] if ON_GPU else [4])
def test_all_blocks_run(waves):
    num_blocks = waves * core_count(INTERPRET)
    out = _numbers(num_blocks, bytes_read=1 << 20, interpret=INTERPRET)
    np.testing.assert_array_equal(out, np.repeat(np.arange(num_blocks)[:, None], 128, axis=1))
