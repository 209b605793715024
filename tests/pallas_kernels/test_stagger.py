import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import core_count
from pallas_kernels.stagger import begin_apart
from tests.pallas_kernels.machine import ON_GPU, lower_for_cuda, mosaic_modules

_CORES = 132


def _numbers(programs: int, bytes_read: int) -> jax.Array:
    """[programs, 128]: each program's number, written once it has begun."""

    def kernel(out):
        program = lax.axis_index("program")
        begin_apart(program, programs, bytes_read)
        out[program] = lax.broadcast_in_dim(program, (128,), ())

    out_type = jax.ShapeDtypeStruct((programs, 128), jnp.int32)
    return plgpu.kernel(kernel, out_type=out_type, grid=(programs,), grid_names=("program",))()


@pytest.mark.parametrize(("programs", "waits"), [(4 * _CORES - 1, []), (4 * _CORES, [1_000])])
def test_waits_where_there_are_more_programs_to_come(programs, waits):
    [module] = mosaic_modules(lower_for_cuda(lambda: _numbers(programs, bytes_read=48_000)))
    assert [int(ns) for ns in re.findall(r"setp\.lt\.u64 waiting, now, (\d+)", module)] == waits


@pytest.mark.skipif(not ON_GPU, reason="the interpreter has no clock to wait by")
@pytest.mark.parametrize("waves", [1, 5])
def test_all_programs_run(waves):
    programs = waves * core_count()
    out = jax.jit(lambda: _numbers(programs, bytes_read=1 << 20))()
    expected = jnp.broadcast_to(jnp.arange(programs)[:, None], (programs, 128))
    assert jnp.array_equal(out, expected)
