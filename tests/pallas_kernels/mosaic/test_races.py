"""The race helper passes a sound pipeline and catches planted races, which Pallas only prints."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.device import launch
from pallas_kernels.mosaic.pipeline import pipeline
from tests.pallas_kernels.machine import ON_GPU
from tests.pallas_kernels.races import run_and_assert_no_races

pytestmark = pytest.mark.skipif(ON_GPU, reason="the race detector is interpret mode's")

STEPS, STAGES, COLUMNS = 5, 2, 128


def sum_rows(x, *, interpret, fault=None, active=None):
    """[STEPS, COLUMNS] -> [COLUMNS]: adds the active rows, by a pipeline that may be faulty."""

    def kernel(block_id, x_gmem, out_gmem, x_smem, full, other_barrier):
        def load(step, stage, full):
            plgpu.copy_gmem_to_smem(x_gmem.at[step], x_smem.at[stage], full)

        def compute(step, stage, total):
            if fault == "refilled before it is computed":
                load(step, stage, other_barrier)
            if fault == "read before it is full":
                stage = (stage + 1) % STAGES
            if fault == "no such stage":
                stage += STAGES
            total += x_smem.at[stage][...]
            if fault == "refilled before it is computed":
                plgpu.barrier_wait(other_barrier)
            return total

        out_gmem[...] = pipeline(
            STEPS,
            STAGES,
            full=full,
            load=load,
            compute=compute,
            init=jnp.zeros(COLUMNS, jnp.float32),
            active=active,
        )

    return launch(
        kernel,
        name="sum_rows",
        num_blocks=1,
        out_type=jax.ShapeDtypeStruct((COLUMNS,), jnp.float32),
        scratch_types=[
            plgpu.SMEM((STAGES, COLUMNS), jnp.float32),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(),
        ],
        interpret=interpret,
    )(x)


@pytest.fixture
def x(seed):
    return jax.random.normal(jax.random.key(seed), (STEPS, COLUMNS))


def test_a_sound_pipeline_passes(x):
    out = run_and_assert_no_races(sum_rows, x)
    chex.assert_trees_all_close(out, x.sum(axis=0), rtol=1e-5, atol=1e-5)


FAULTS = ["refilled before it is computed", "read before it is full"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_race_is_caught(x, fault, capsys):
    with pytest.raises(AssertionError, match=r"kernels \[0\] of 1 race(.|\n)*test_races.py"):
        run_and_assert_no_races(sum_rows, x, fault=fault)
    assert capsys.readouterr().out == ""
    # Nothing of it is left for the next kernel.
    run_and_assert_no_races(sum_rows, x)


def test_a_pipeline_that_does_not_commit_its_reads_is_caught(x, monkeypatch):
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    with pytest.raises(AssertionError, match=r"write at .*test_races.py(.|\n)*read at "):
        run_and_assert_no_races(sum_rows, x)


def test_a_race_in_a_kernel_before_the_last_is_caught(x):
    def two_kernels(x, *, interpret):
        racing = sum_rows(x, interpret=interpret, fault="refilled before it is computed")
        return sum_rows(x + racing, interpret=interpret)

    with pytest.raises(AssertionError, match=r"kernels \[0\] of 2 race"):
        run_and_assert_no_races(two_kernels, x)


def test_under_jit(x):
    jitted = functools.partial(jax.jit, static_argnames=("interpret", "fault"))
    with pytest.raises(AssertionError, match=r"kernels \[0\] of 1 race"):
        run_and_assert_no_races(jitted(sum_rows), x, fault="read before it is full")


def test_a_function_without_a_watched_kernel_is_an_error(x):
    with pytest.raises(AssertionError, match="none was watched"):
        run_and_assert_no_races(lambda x, *, interpret: x + 1, x)
    # Runs a kernel, but without the detector.
    unwatched = plgpu.InterpretGPUParams()
    with pytest.raises(AssertionError, match="none was watched"):
        run_and_assert_no_races(lambda x, *, interpret: sum_rows(x, interpret=unwatched), x)


def test_a_failing_kernel_leaves_nothing_behind(x):
    with pytest.raises(Exception, match=r"(?i)out.of.bounds"):
        run_and_assert_no_races(sum_rows, x, fault="no such stage")
    run_and_assert_no_races(sum_rows, x)


def test_inactive_steps_are_skipped(x):
    def active(step):
        return step % 3 != 1

    out = run_and_assert_no_races(sum_rows, x, active=active)
    expected = x[active(jnp.arange(STEPS))].sum(axis=0)
    chex.assert_trees_all_close(out, expected, rtol=1e-5, atol=1e-5)
