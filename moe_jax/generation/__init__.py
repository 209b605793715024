"""Generation: `generate` returns everything at once, `stream` an iterator; both on token ids.

    from moe_jax.generation import Sampling, generate

    generate(model, [[1, 2, 3]], sampling=Sampling(temperature=0.7, top_p=0.9), max_new_tokens=20)

`decode.py` holds the compiled functions, `streaming.py` the loop around them, `sampling.py` and
`logits_processors.py` how a token is chosen, `logprobs.py` how likely the model found it, `text.py`
and `stopping.py` what becomes of its text.
"""

from moe_jax.generation.defaults import GenerationDefaults, read_generation_defaults
from moe_jax.generation.logprobs import TokenLogprobs
from moe_jax.generation.results import Generation, TraceRecorder, collect, generate
from moe_jax.generation.sampling import Sampling
from moe_jax.generation.streaming import Event, stream

__all__ = [
    "Event",
    "Generation",
    "GenerationDefaults",
    "Sampling",
    "TokenLogprobs",
    "TraceRecorder",
    "collect",
    "generate",
    "read_generation_defaults",
    "stream",
]
