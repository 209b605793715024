"""Whether a run that goes on is the one that was cut off: all that decides its numbers, by name.

    {"optimizer.learning_rate": 0.004, "config.num_experts": 8, "step.balance": "per_layer",
     "data.seed": 0, "data.texts": "9f86d0...", "host.jax": "0.11.2", ...}

What decides the numbers must be as it was. What only says how they are computed may be another:
bits then differ by rounding. So may the number of steps, which the schedule depends on.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from moe_jax.checkpoints.errors import CheckpointError
from moe_jax.training.objective import TrainOptions

Json = str | int | float | bool | None

# Of these the result is the same but for rounding.
_ROUNDING = {
    "step.remat",
    "step.logit_columns",
    "step.experts_backend",
    "step.attention_backend",
    "step.platform",
    "step.parallelism",
    "data.micro_batches",
    "host.jax",
    "host.device",
}
_TOTAL_STEPS = "optimizer.total_steps"


def describe_run(options: TrainOptions, data: Mapping[str, Json]) -> dict[str, Any]:
    """Everything that a run's numbers follow from, ready for JSON.

    Args:
      options: how a step is computed.
      data: by name, what its batches are made of: the seed, the sizes, a checksum of the texts.
        `micro_batches` may change while a run is cut off; all else must stay.
    """
    step = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in ("config", "optimizer")
    }
    parts = {
        "config": options.config.to_hf(),
        "optimizer": dataclasses.asdict(options.optimizer),
        "step": step,
        "data": data,
        "host": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
    }
    flat = {f"{part}.{name}": parts[part][name] for part in parts for name in parts[part]}
    return json.loads(json.dumps(flat, default=str))


def expect_same(
    folder: pathlib.Path, before: Mapping[str, Any], now: Mapping[str, Any], step: int
) -> list[str]:
    """What has changed and may have, a line each; a name that one of them lacks counts as None.

    Args:
      folder: of the run's states, for the error.
      before: the description of the run that did `step` steps.
      now: that of the run which is to go on.

    Raises:
      CheckpointError: it is another run, and `problems` has a line for each name; or this one is to
        do fewer steps than are done.
    """
    if step > now[_TOTAL_STEPS]:
        raise CheckpointError(
            f"{_TOTAL_STEPS} is {now[_TOTAL_STEPS]}; expected at least {step}, which the run in "
            f"{folder} has done"
        )
    refused, allowed = [], []
    for name in sorted(before.keys() | now.keys()):
        was, value = before.get(name), now.get(name)
        if was == value:
            continue
        line = f"{name} was {was!r} and is {value!r}"
        if name in _ROUNDING:
            allowed.append(f"{line}: bits may differ by rounding")
        elif name == _TOTAL_STEPS:
            if now["optimizer.schedule"] != "constant":
                line += ": the learning rate falls over as many steps from here on"
            allowed.append(line)
        else:
            refused.append(line)
    if refused:
        raise CheckpointError(
            f"{folder} is of a run with other options, so it cannot go on with these: "
            + "; ".join(refused),
            tuple(("changed", line) for line in refused),
        )
    return allowed
