"""How a token is chosen from logits: functions on [B, V], in the order that `choose` applies them.

    1. repetition_penalty   tokens that the row has seen become less likely
    2. temperature          logits / temperature; 0 takes the highest logit and skips 3 to 6
    3. top_k                the k highest stay, the others become -inf
    4. top_p                the fewest that hold a probability of p stay
    5. min_p                those at least min_p times as likely as the likeliest stay
    6. a draw from the softmax of what is left

Order and meaning are those of transformers' logits processors. All of it is float32.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.platform_ops import XLA, PlatformOps

# What `choose` returns for a row without a highest logit: NaN among them, or nothing but -inf.
NO_TOKEN = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; the default is greedy. Checked when made.

    Attributes:
      temperature: 0 is greedy: the highest logit, the lowest id of equal ones.
      top_k: 0 is off.
      top_p: 1 is off.
      min_p: 0 is off.
      repetition_penalty: 1 is off; above 1 a row's prompt and what it has generated so far become
        less likely, below 1 more likely. Applies to greedy choices too.

    Raises:
      ValueError: names the field, its value and what is accepted.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        # Bounds beyond which float32 logits would overflow.
        if self.temperature != 0:
            _check_number("temperature", self.temperature, 1e-5, 1e5, " or 0 (greedy)")
        _check_number("top_p", self.top_p, 0, 1, " (off)")
        _check_number("min_p", self.min_p, 0, 1, "; 0 is off")
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100, "; 1 is off")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k!r}; expected a whole number, 0 (off) or more")

    @property
    def steps(self) -> "Steps":
        """Which of the functions above do anything: what a compiled function is specialised to."""
        drawn = self.temperature > 0
        return Steps(
            draw=drawn,
            repetition_penalty=self.repetition_penalty != 1,
            top_k=drawn and self.top_k > 0,
            top_p=drawn and self.top_p < 1,
            min_p=drawn and self.min_p > 0,
        )

    def values(self) -> dict[str, jax.Array]:
        """The numbers as arrays, so that other values compile nothing anew."""
        return {
            "temperature": jnp.float32(self.temperature),
            "top_k": jnp.int32(min(self.top_k, 2**31 - 1)),
            "removed_mass": jnp.float32(1 - self.top_p),
            "min_p": jnp.float32(self.min_p),
            "repetition_penalty": jnp.float32(self.repetition_penalty),
        }


class Steps(NamedTuple):
    """Which functions apply; hashable, as a static argument must be."""

    draw: bool
    repetition_penalty: bool
    top_k: bool
    top_p: bool
    min_p: bool


def repetition_penalty(logits: jax.Array, seen: jax.Array, penalty) -> jax.Array:
    """Divides positive logits of seen tokens by the penalty, multiplies negative ones with it.

    Args:
      logits: [B, V] float32.
      seen: [B, V] bool, the tokens of each row's prompt and of what it generated.
      penalty: above 0.
    """
    penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalised, logits)


def temperature(logits: jax.Array, value) -> jax.Array:
    """Divides logits [B, V] by a temperature above 0."""
    return logits / value


def top_k(logits: jax.Array, k) -> jax.Array:
    """Keeps the k highest of each row and all that equal the last of them; the rest is -inf."""
    return _drop_below(logits, _kth_highest(jnp.sort(logits, axis=-1), k))


def top_p(logits: jax.Array, p) -> jax.Array:
    """Keeps the fewest tokens of each row that together reach probability p, at least one.

    Of equal logits at the border the lower ids stay. How many stay is as in transformers; which
    ones is left to an unstable sort there.
    """
    return _drop_tail(logits, jnp.sort(logits, axis=-1), 1 - p)


def min_p(logits: jax.Array, p) -> jax.Array:
    """Keeps tokens whose probability is at least p times that of their row's likeliest."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    floor = p * jnp.max(probabilities, axis=-1, keepdims=True)
    return jnp.where(probabilities < floor, -jnp.inf, logits)


def process(logits: jax.Array, seen: jax.Array | None, steps: Steps, values: dict[str, Any]):
    """Steps 1 to 5 of the module on logits [B, V] of any float dtype; `seen` as above or None."""
    logits = logits.astype(jnp.float32)
    if steps.repetition_penalty:
        logits = repetition_penalty(logits, seen, values["repetition_penalty"])
    if steps.draw:
        logits = temperature(logits, values["temperature"])
    if steps.top_k or steps.top_p:
        # One sort serves both: what top_k drops is the lower end of the sorted row too.
        ordered = jnp.sort(logits, axis=-1)
        if steps.top_k:
            border = _kth_highest(ordered, values["top_k"])
            logits, ordered = _drop_below(logits, border), _drop_below(ordered, border)
        if steps.top_p:
            logits = _drop_tail(logits, ordered, values["removed_mass"])
    if steps.min_p:
        logits = min_p(logits, values["min_p"])
    return logits


def row_keys(seeds: jax.Array, rows: jax.Array) -> jax.Array:
    """[B] random keys, each of (seed, row) alone; seeds and rows are [B] unsigned integers."""
    return jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(seeds, rows)


def choose(
    logits: jax.Array,
    seen: jax.Array | None,
    keys: jax.Array,
    index: jax.Array,
    steps: Steps,
    values: dict[str, Any],
    ops: PlatformOps = XLA,
) -> jax.Array:
    """Chooses a token for each row.

    The draw depends on the row's key, the token's number and the row's logits, on nothing else: not
    on the batch, nor on padding.

    Args:
      logits: [B, V] of any float dtype.
      seen: [B, V] bool; None where steps.repetition_penalty is off.
      keys: [B] random keys, from `row_keys`.
      index: int32, how many tokens each row has generated so far.
      steps, values: of the Sampling.
      ops: the platform's form of argmax, for greedy choices; draws sort, on any platform.

    Returns:
      [B] int32; NO_TOKEN for a row that has a NaN or no finite maximum.
    """
    has_choice = jnp.max(logits, axis=-1) > -jnp.inf  # False for NaN
    logits = process(logits, seen, steps, values)
    if steps.draw:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
        tokens = jax.vmap(jax.random.categorical)(keys, logits)
    else:
        tokens = ops.argmax(logits)
    return jnp.where(has_choice, tokens, NO_TOKEN).astype(jnp.int32)


def _kth_highest(ordered: jax.Array, k) -> jax.Array:
    """[B, 1], from rows [B, V] in ascending order; the lowest where k exceeds V."""
    V = ordered.shape[-1]
    place = jnp.maximum(V - jnp.asarray(k), 0)
    return jax.lax.dynamic_slice_in_dim(ordered, place, 1, axis=-1)


def _drop_below(logits: jax.Array, border: jax.Array) -> jax.Array:
    return jnp.where(logits < border, -jnp.inf, logits)


def _drop_tail(logits: jax.Array, ordered: jax.Array, removed_mass) -> jax.Array:
    """Drops the least likely tokens that together hold no more than `removed_mass`.

    Args:
      logits: [B, V].
      ordered: [B, V], the same in ascending order.
      removed_mass: a probability.
    """
    V = ordered.shape[-1]
    mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    dropped = jnp.sum(mass <= removed_mass, axis=-1, keepdims=True)
    dropped = jnp.minimum(dropped, V - 1)  # [B, 1]; the likeliest always stays
    border = jnp.take_along_axis(ordered, dropped, axis=-1)
    # Without moving `dropped` back through the sort: all below the border go, and of those equal to
    # it stay as many as the sorted row still has from there on.
    equal = logits == border
    stay = V - dropped - jnp.sum(logits > border, axis=-1, keepdims=True)
    goes = (logits < border) | (equal & (jnp.cumsum(equal, axis=-1) > stay))
    return jnp.where(goes, -jnp.inf, logits)


def _check_number(name: str, value: Any, least: float, most: float, note: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}; expected {least:g} to {most:g}{note}")
