"""AdamW with clipped gradients and a schedule, by optax."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW's numbers. Immutable and hashable, so all of it is static under jit.

    Attributes:
      learning_rate: the largest, reached after the warm-up.
      warmup_steps: over which the learning rate rises from 0; 0 begins at the largest.
      total_steps: after which it has fallen to `end_factor` times the largest.
      end_factor: 0 to 1; of "cosine" and "linear".
      schedule: a name in SCHEDULES, how it falls.
      b1, b2, eps: of Adam's moments.
      weight_decay: of matrices and experts; norms and biases, which are vectors, have none.
      clip_norm: the largest norm of all gradients together; None does not clip.

    Raises:
      ValueError: a number is out of its range; names it, its value and what is accepted.
    """

    learning_rate: float = 3e-4
    warmup_steps: int = 100
    total_steps: int = 1000
    end_factor: float = 0.1
    schedule: str = "cosine"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; expected one of {list(SCHEDULES)}")
        ranges = {
            "learning_rate": (0, None),
            "total_steps": (1, None),
            "warmup_steps": (0, self.total_steps - 1),
            "end_factor": (0, 1),
            "b1": (0, 1),
            "b2": (0, 1),
            "eps": (0, None),
            "weight_decay": (0, None),
            "clip_norm": (0, None),
        }
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if value is None and name == "clip_norm":
                continue
            if not value >= least or (most is not None and value > most):  # NaN too
                accepted = f"at least {least}" if most is None else f"{least} to {most}"
                raise ValueError(f"{name} is {value}; expected {accepted}")


def learning_rate_at(options: OptimizerOptions, step: jax.Array | int) -> jax.Array:
    """float32: the learning rate of a step, the first of which is number 0."""
    largest, falls_for = options.learning_rate, options.total_steps - options.warmup_steps
    end = options.end_factor
    falls = {
        "cosine": optax.cosine_decay_schedule(largest, falls_for, alpha=end),
        "linear": optax.linear_schedule(largest, largest * end, falls_for),
        "constant": optax.constant_schedule(largest),
    }[options.schedule]
    # The first step of a warm-up has a rate above 0, because a step without one does nothing.
    rises = optax.linear_schedule(
        largest / max(options.warmup_steps, 1), largest, max(options.warmup_steps - 1, 1)
    )
    joined = optax.join_schedules([rises, falls], [options.warmup_steps])
    return jnp.asarray(joined(step), jnp.float32)


def make_optimizer(options: OptimizerOptions) -> optax.GradientTransformation:
    """Clips by the global norm, then AdamW; its state is a pytree of arrays like the parameters."""
    clip = optax.identity()
    if options.clip_norm is not None:
        clip = optax.clip_by_global_norm(options.clip_norm)
    return optax.chain(
        clip,
        optax.adamw(
            lambda count: learning_rate_at(options, count),
            b1=options.b1,
            b2=options.b2,
            eps=options.eps,
            weight_decay=options.weight_decay,
            mask=lambda params: jax.tree.map(lambda array: array.ndim > 1, params),
        ),
    )
