"""Log-probabilities of generated tokens: computed in the compiled step, read where tokens are read.

They are the model's own: the log-softmax in float32 of its raw logits, before any penalty, ban,
temperature or filter of the Sampling. So they say how likely the model finds a token, however that
token was chosen, and they compare across Samplings. They are natural logarithms.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.platform_ops import XLA, PlatformOps


class StepLogprobs(NamedTuple):
    """Of the tokens of a step, or with a first axis N of N steps.

    Attributes:
      chosen: [B] float32, of the sampled tokens; it means nothing for a row without a choice.
      top_ids: [B, n] int32, the likeliest tokens, from the likeliest down.
      top: [B, n] float32, theirs.
    """

    chosen: jax.Array
    top_ids: jax.Array
    top: jax.Array


class TokenLogprobs(NamedTuple):
    """Of one generated token, in the numbers of Python.

    Attributes:
      chosen: the token's own log-probability.
      top: (token id, log-probability) of the likeliest tokens, from the likeliest down; the lower
        id first where logits are equal. The chosen token is among them only if it is that likely.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


def logprobs_of(
    logits: jax.Array, tokens: jax.Array, n: int, ops: PlatformOps = XLA
) -> StepLogprobs:
    """The log-probabilities of `tokens` and of the n likeliest.

    Args:
      logits: [B, V] of any float dtype, as the model returns them.
      tokens: [B] int32; a negative one gets the figure of token 0, which means nothing.
      n: 0 to V.
      ops: the platform's form of top_k.
    """
    logits = logits.astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(log_p, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
    # By the logits, because different ones may round to the same log-probability.
    top_ids = ops.top_k(logits, n)[1] if n else jnp.zeros((logits.shape[0], 0), jnp.int32)
    top = jnp.take_along_axis(log_p, top_ids, axis=-1)
    return StepLogprobs(chosen=chosen, top_ids=top_ids.astype(jnp.int32), top=top)


def no_logprobs(N: int, B: int, n: int) -> StepLogprobs:
    """Of N steps that have not run."""
    return StepLogprobs(
        chosen=jnp.full((N, B), jnp.nan, jnp.float32),
        top_ids=jnp.zeros((N, B, n), jnp.int32),
        top=jnp.full((N, B, n), jnp.nan, jnp.float32),
    )


def of_token(found: StepLogprobs, step: int, row: int) -> TokenLogprobs:
    """One token's, from the NumPy arrays of several steps."""
    pairs = zip(found.top_ids[step, row].tolist(), found.top[step, row].tolist(), strict=True)
    return TokenLogprobs(chosen=found.chosen[step, row].item(), top=tuple(pairs))
