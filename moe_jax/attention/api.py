"""attention: the one function through which every layer's queries attend to keys."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe_jax.attention.cudnn import cudnn_attention
from moe_jax.attention.xla import xla_attention
from moe_jax.dispatch import Backend, Request, resolve_backend
from moe_jax.platforms import resolve_platform

_WINDOW, _SEGMENTS = "a sliding window", "segments"
_WIDE_HEADS = "heads of more than 128 elements"
_ODD = "an odd number of queries or keys in training"
_NO_GPU = "a process without an NVIDIA GPU"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionRequest(Request):
    """One call of `attention`, for moe_jax.dispatch; T is B * S.

    Attributes:
      S: queries of each row.
      N: keys of each row.
      heads, kv: query heads, and the keys and values that they share.
      D: size of a head.
      window: whether there is a sliding window.
      segments: whether a row holds several sequences.
      own_keys: whether key s of each row is known to be the token of query s.
      unpadded: whether, besides, that token is known to be in slot s.
      on_gpu: whether JAX's default device is a GPU, so that libraries for it can be asked.
    """

    op: ClassVar[str] = "attention"
    S: int
    N: int
    heads: int
    kv: int
    D: int
    window: bool = False
    segments: bool = False
    own_keys: bool = False
    unpadded: bool = False
    on_gpu: bool = True

    @property
    def sizes(self) -> dict[str, int]:
        return {"D": self.D}

    @property
    def features(self) -> tuple[str, ...]:
        causal = self.own_keys and not self.segments and (self.unpadded or not self.window)
        odd = not causal and (self.S % 2 or self.N % 2)
        asked = {
            _WINDOW: self.window,
            _SEGMENTS: self.segments,
            _WIDE_HEADS: self.D > 128,
            _ODD: self.phase == "training" and odd,
            _NO_GPU: not self.on_gpu,
        }
        return tuple(feature for feature, is_asked in asked.items() if is_asked)


ATTENTION_BACKENDS: dict[str, Backend] = {
    "xla": Backend(
        run=xla_attention,
        what="plain XLA: every query against every key, softmax in float32",
        rel_error={"float32": 1e-5, "bfloat16": 6e-3, "float16": 1e-3},
        features=(_WINDOW, _SEGMENTS, _WIDE_HEADS, _ODD, _NO_GPU),
    ),
    "cudnn": Backend(
        run=cudnn_attention,
        what="cuDNN's flash attention by jax.nn.dot_product_attention: keeps no scores",
        rel_error={"bfloat16": 6e-3, "float16": 1e-3},
        platforms=("cuda",),
        phases=("prefill", "training"),
        size_multiple=8,
        features=(_WINDOW, _SEGMENTS),
    ),
}


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    query_slots: jax.Array,
    key_slots: jax.Array,
    segments: jax.Array | None = None,
    window: int | None = None,
    own_keys: bool = False,
    unpadded: bool = False,
    backend: str = "auto",
    platform: str | None = None,
    phase: str = "prefill",
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v over the keys that each query sees; scores and softmax in float32.

    A query sees the keys whose slots are at most its own, in its own segment, and within the
    window. The result of a query that sees no key (padding) is finite and otherwise undefined.

    Args:
      q: [B, heads, S, D].
      k, v: [B, kv, N, D]; heads / kv query heads share one of them.
      query_slots: [B, S] int32, each query's place in its row.
      key_slots: [B, N] int32, each key's place in its row; negative where there is no key.
      segments: [B, S] int32 with N = S, the sequence that each token belongs to; None for one a
        row.
      window: how many keys a query sees at most, its own among them; None for all.
      own_keys: whether key s of each row is known to be the token of query s, and a row's first
        token to be in slot 0. Without it a backend learns from the slots alone what to leave out.
      unpadded: whether, besides, no token is padding: all slots are 0, 1, ... in order.
      backend: a name in ATTENTION_BACKENDS, or "auto": the environment variable
        MOE_JAX_ATTENTION_BACKEND, and without that the table of moe_jax.dispatch.
      platform: what to choose for, as in moe_jax.platforms.resolve_platform.
      phase: "prefill", "decode" or "training", for the table.

    Returns:
      [B, heads, S, D] in q's dtype.

    Raises:
      ValueError: no such backend.
      NotImplementedError: the backend cannot do this; the message says what and who can.
    """
    B, heads, S, D = q.shape
    request = AttentionRequest(
        platform=resolve_platform(platform),
        phase=phase,
        T=B * S,
        dtype=jnp.dtype(q.dtype).name,
        S=S,
        N=k.shape[2],
        heads=heads,
        kv=k.shape[1],
        D=D,
        window=window is not None,
        segments=segments is not None,
        own_keys=own_keys,
        unpadded=unpadded,
        on_gpu=jax.default_backend() == "gpu",
    )
    choice = resolve_backend(request, ATTENTION_BACKENDS, backend)
    return ATTENTION_BACKENDS[choice.backend].run(
        q,
        k,
        v,
        query_slots=query_slots,
        key_slots=key_slots,
        segments=segments,
        window=window,
        own_keys=own_keys,
        unpadded=unpadded,
    )
