"""The rows of train_speed: a training step on one device or on a mesh.

    {"kind": "train_speed", "run": 0, "mesh": "data=2", "step_s": 0.81, "mfu": 0.21, ...}

The file around them is that of records.py.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

from experiments.bench import records
from experiments.bench.environment import Environment


@dataclasses.dataclass(kw_only=True)
class TrainSpeedRow:
    """One mesh and routing; None where a figure was not taken.

    Attributes:
      run: where and how it was measured.
      kind: "train_speed".
      mesh: axes and sizes, as in "data=2"; "one" for one device.
      layers, batch, accumulate, context: of the step; batch is of all devices.
      routing: "model" where the routers choose; else what the batch's replay holds, as
        routings.py names it.
      parameters, active_parameters: of the model, and those that a token uses.
      devices: how many.
      step_s: seconds, the median.
      tokens_per_s: of all devices.
      model_tflops: TFLOP/s of all devices, without what is computed anew.
      mfu: model_tflops over the peak.
      loss: of the last step.
      imbalance: of each MoE layer in the last step, the largest load over the mean.
      compile_s: seconds to trace, lower and compile.
      peak_bytes: the most that the process had allocated on one device, so far.
      backends: what computed each op.
      kernels: kernel class -> [launches a step, us a step] of one device, where --profile asked
        for it; the classes are kernel_profile.TRAIN_STEP's.
      profile_error: why kernels were asked for and are missing.
      error: what went wrong, if anything did.
    """

    run: Environment
    kind: str = "train_speed"
    mesh: str
    layers: int
    batch: int
    accumulate: int
    context: int
    routing: str = "model"
    parameters: int
    active_parameters: int
    devices: int = 1
    step_s: float | None = None
    tokens_per_s: float | None = None
    model_tflops: float | None = None
    mfu: float | None = None
    loss: float | None = None
    imbalance: list[float] | None = None
    compile_s: float | None = None
    peak_bytes: int | None = None
    backends: dict[str, str] | None = None
    kernels: dict[str, list[float]] | None = None
    profile_error: str | None = None
    error: str | None = None

    @property
    def said(self) -> str:
        """The row in a line."""
        model = f"{self.mesh}, routing {self.routing}: {self.parameters / 1e9:.2f} B parameters"
        if self.error is not None:
            return f"{model}: FAILED: {self.error}"
        memory = "" if not self.peak_bytes else f", {self.peak_bytes / 1e9:.1f} GB at most"
        return (
            f"{model}, {self.active_parameters / 1e9:.2f} B for a token: {self.step_s:.3f} s a "
            f"step, {self.tokens_per_s:.0f} tok/s, {self.model_tflops:.1f} TFLOP/s, MFU "
            f"{100 * self.mfu:.1f}% of {self.devices}; imbalance {max(self.imbalance or [0]):.2f}, "
            f"loss {self.loss:.3f}, compiled in {self.compile_s:.1f} s{memory}; {self.backends}"
        )

    @property
    def kernel_lines(self) -> list[str]:
        """The kernels' classes as lines, the longest first; none where none were asked for."""
        if self.profile_error is not None:
            return [f"  no times of kernels: {self.profile_error}"]
        if self.kernels is None:
            return []
        lines = [
            f"  {us / 1e3:9.3f} ms in {launches:7.1f} launches a step: {name}"
            for name, (launches, us) in self.kernels.items()
        ]
        total = sum(us for _, us in self.kernels.values()) / 1e3
        return [*lines, f"  {total:9.3f} ms of kernels in a step of {1e3 * self.step_s:.3f} ms"]


KINDS: Mapping[str, type] = {"train_speed": TrainSpeedRow}


def read_record(path: pathlib.Path) -> records.Record:
    """Reads a file of train_speed.

    Raises:
      ValueError: a line is none of this format; names the line and the field.
    """
    return records.read_record(path, KINDS)
