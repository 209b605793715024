"""The flags that say how a training step is computed, and on which devices."""

import dataclasses
import math

from experiments.bench import mesh_flags, processes
from experiments.bench.script import flag
from moe_jax.attention import ATTENTION_BACKENDS
from moe_jax.config import Qwen3MoeConfig
from moe_jax.experts import EXPERTS_BACKENDS
from moe_jax.parallelism import EXCHANGES, Parallelism
from moe_jax.training import OptimizerOptions, TrainOptions
from moe_jax.training.objective import COMPUTE_DTYPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFlags:
    """Those of experiments.train that decide no number but for rounding, and the balance loss's."""

    balance: str = flag(
        "per_layer",
        "What the balance loss is taken over: all layers' tokens pooled, as Hugging Face has it, "
        "hide a layer behind the others.",
        of=("pooled", "per_layer"),
    )
    compute_dtype: str = flag("bfloat16", "What the step computes in.", of=COMPUTE_DTYPES)
    remat: bool = flag(False, "Whether the backward pass computes each layer anew.")
    logit_columns: int | None = flag(
        None, "Positions of a row whose logits are in memory at once; all by default.", least=1
    )
    experts_backend: str = flag("auto", "What computes experts.", of=("auto", *EXPERTS_BACKENDS))
    attention_backend: str = flag(
        "auto", "What computes attention.", of=("auto", *ATTENTION_BACKENDS)
    )
    mesh: tuple[str, ...] = flag((), mesh_flags.MESH_HELP)
    expert_exchange: str = flag(
        "auto", "With --mesh: how tokens get to other shards' experts.", of=EXCHANGES
    )
    coordinator: str = flag(
        "", "host:port of the first of several processes, which all get the same flags."
    )
    processes: int = flag(1, "How many of them there are.", least=1)
    process_id: int = flag(0, "Which of them this is; 0 is the first.", least=0)

    def __post_init__(self):
        sizes = mesh_flags.sizes_of(self.mesh)
        if (self.processes > 1) != bool(self.coordinator):
            raise ValueError(
                f"--processes is {self.processes} and --coordinator {self.coordinator!r}; expected "
                "both, as in --processes=2 --coordinator=localhost:1234, or none"
            )
        if self.process_id >= self.processes:
            raise ValueError(
                f"--process_id is {self.process_id}; expected 0 to {self.processes - 1}, as "
                f"--processes is {self.processes}"
            )
        if self.processes > 1 and math.prod(sizes.values()) < self.processes:
            raise ValueError(
                f"--mesh is {','.join(self.mesh)!r}; expected at least a device for each of "
                f"{self.processes} processes, as in data={self.processes}"
            )

    def check_rows(self, batch: int) -> None:
        """Raises a ValueError if the mesh does not divide --batch rows."""
        sizes = mesh_flags.sizes_of(self.mesh)
        both = sizes.get("data", 1) * sizes.get("expert", 1)
        if batch % both:
            raise ValueError(
                f"--batch is {batch}; expected a multiple of {both}, the devices along --mesh's "
                "axes data and expert"
            )

    def join(self) -> None:
        """Joins the other processes, if there are any; before JAX makes its devices."""
        if self.processes > 1:
            processes.join(self.coordinator, self.processes, self.process_id)

    @property
    def parallelism(self) -> Parallelism | None:
        """Raises a ValueError if there are too few devices."""
        return mesh_flags.parallelism_of(self.mesh, exchange=self.expert_exchange)

    def step_options(self, config: Qwen3MoeConfig, optimizer: OptimizerOptions) -> TrainOptions:
        """How a step is computed.

        Raises:
          ValueError: there are too few devices, or the mesh does not divide the config.
        """
        parallelism = self.parallelism
        if parallelism is not None:
            parallelism.check(config)
        return TrainOptions(
            # Without what config.json has besides, which the step does not depend on.
            config=dataclasses.replace(config, extra={}),
            optimizer=optimizer,
            compute_dtype=self.compute_dtype,
            balance=self.balance,
            remat=self.remat,
            logit_columns=self.logit_columns,
            experts_backend=self.experts_backend,
            attention_backend=self.attention_backend,
            parallelism=parallelism,
        )
