"""Asserts the verdict of Pallas's race detector, which Pallas itself only prints."""

import contextlib
import io
import re

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu


@contextlib.contextmanager
def _recorded_verdicts():
    """Yields a list that gets the race state of every kernel run in the meantime, in order.

    The interpreter's own get_races() has the last kernel's state only; an op may have several.
    """
    verdicts = []
    make_state = gpu_callbacks.GPURaceDetectionState

    def make_and_record(*arguments, **keywords):
        verdicts.append(make_state(*arguments, **keywords))
        return verdicts[-1]

    gpu_callbacks.GPURaceDetectionState = make_and_record
    try:
        yield verdicts
    finally:
        gpu_callbacks.GPURaceDetectionState = make_state


def run_and_assert_no_races(function, *arguments, **keywords):
    """Calls function(*arguments, interpret=..., **keywords) with the race detector watching.

    The interpreter runs wgmma synchronously and does not watch its operands, so a wgmma that still
    reads a stage while it is refilled passes here: see `wgmmas_in_flight` of mosaic/pipeline.py.

    Args:
      function: takes `interpret` and hands it to every plgpu.kernel it runs.
      *arguments: passed on, as are the keywords.

    Returns:
      What the function returns, computed.

    Raises:
      AssertionError: some kernel raced, with the racing lines; or no kernel was watched at all.
    """
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    printed = io.StringIO()
    try:
        with _recorded_verdicts() as verdicts, contextlib.redirect_stdout(printed):
            result = jax.block_until_ready(function(*arguments, interpret=interpret, **keywords))
    except BaseException:
        # What a failed kernel leaves behind would break the next one.
        gpu_callbacks.reset_gpu_interpret_mode_state()
        raise
    if not any(state.writes for state in verdicts):
        raise AssertionError(
            f"{len(verdicts)} kernels ran in interpret mode and none was watched for races; "
            "expected the function to run at least one with the `interpret` that it was given"
        )
    racing = [index for index, state in enumerate(verdicts) if state.races_found]
    if racing:
        raise AssertionError(
            f"kernels {racing} of {len(verdicts)} race:\n{_pairs_of_places(printed.getvalue())}"
        )
    return result


def _pairs_of_places(printed: str) -> str:
    """Each pair of racing source lines once, out of a report for each pair of accesses."""
    pairs = {}
    for report in printed.split("RACE DETECTED")[1:]:
        accesses = re.findall(r"^ *(read|write) of .* from .*, (\S+:\d+:\d+ .*)$", report, re.M)
        pair = "\n".join(f"  {kind} at {place}" for kind, place in accesses) or report
        pairs[pair] = pairs.get(pair, 0) + 1
    return "\n".join(f"{count} times\n{pair}" for pair, count in pairs.items())
