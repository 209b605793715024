"""What XLA made of a baseline, read off the compiled program: silent expansions are to be named."""

import re
from typing import Any

from experiments.compare.timing import JaxChain
from pallas_kernels.decode_experts import ExpertShapes


def inspect(name: str, chain: JaxChain, T: int, shapes: ExpertShapes) -> dict[str, Any]:
    """Facts for the record: temporary_bytes, and for a ragged product whether it was made dense."""
    facts: dict[str, Any] = {"temporary_bytes": chain.temporary_bytes}
    if name == "xla_ragged":
        facts["dense_expansion"] = is_dense_expansion(chain.compiled.as_text(), T, shapes)
    return facts


def is_dense_expansion(text: str, T: int, shapes: ExpertShapes) -> bool:
    """Whether compiled HLO holds every assignment's row, or its product, once for each expert.

    XLA expands a ragged product by copying each of the T * K rows to its expert's place in a zero
    array with an expert dimension, and multiplying that by all experts' weights.
    """
    TK, E, H, I = T * shapes.K, shapes.E, shapes.H, shapes.I
    if E == 1:
        return False
    return any(re.search(rf"\[(?:{TK},{E}|{E},{TK}),{width}\]", text) for width in (H, I, 2 * I))
