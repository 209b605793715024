"""Training: one pure step, (state, batch) -> (state, metrics), over the global batch.

    options = TrainOptions(config=config, optimizer=OptimizerOptions(total_steps=1000))
    state = init_state(to_arrays(model), options.optimizer)
    step = jax.jit(train_step, static_argnames="options", donate_argnames="state")
    state, metrics = step(state, batch, options=options)

Everything that changes is in the TrainState. A batch is a function of the step's number alone, so a
run that goes on from a state sees the batches that it would have seen. moe_jax.training.states
saves states while the run trains on, and restores them.
"""

from moe_jax.training.batches import Batch, PackedDocuments
from moe_jax.training.objective import RouterSums, TrainOptions
from moe_jax.training.optimizer import OptimizerOptions, learning_rate_at, make_optimizer
from moe_jax.training.train_step import (
    TrainMetrics,
    TrainState,
    gradients_of,
    init_state,
    train_step,
)

__all__ = [
    "Batch",
    "OptimizerOptions",
    "PackedDocuments",
    "RouterSums",
    "TrainMetrics",
    "TrainOptions",
    "TrainState",
    "gradients_of",
    "init_state",
    "learning_rate_at",
    "make_optimizer",
    "train_step",
]
