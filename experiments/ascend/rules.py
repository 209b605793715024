"""What an operation of a module for Ascend may be, and what is to be said of one that may not.

An allow-list: what is not in `PLAIN` is a problem, whether or not somebody has thought of it. The
operations with several forms have a rule each in `_RULES`.
"""

from collections.abc import Iterator

from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo

# Elementwise operations, shapes, dots and calls; composites, gathers and reduces by rules below.
_STABLEHLO = """
    abs add and broadcast_in_dim ceil clamp compare composite concatenate constant convert cosine
    divide dot_general exponential exponential_minus_one floor gather iota is_finite log
    log_plus_one logistic maximum minimum multiply negate not or pad power reduce remainder reshape
    return rsqrt select sign sine slice sqrt subtract tanh transpose
"""
PLAIN = frozenset(
    {"builtin.module", "func.func", "func.call", "func.return"}
    | {f"stablehlo.{name}" for name in _STABLEHLO.split()}
)
COMPOSITES = "superkernel."

_CONTROL_FLOW = "unroll it, or choose in Python before tracing"
_RANDOM = "decode greedily, or draw outside"
_SCATTER = "use a comparison with an iota and a select, or gather and reduce"
_SORT = "use K passes of max-reduce, min-index-reduce and mask"
_STATIC = "use static offsets, or a comparison with an iota and a select"

# What to write in place of what JAX code meets most; the other operations have no entry.
_INSTEAD = {
    "chlo.top_k": _SORT,
    "stablehlo.sort": _SORT,
    "stablehlo.scatter": _SCATTER,
    "stablehlo.while": _CONTROL_FLOW,
    "stablehlo.case": _CONTROL_FLOW,
    "stablehlo.if": _CONTROL_FLOW,
    "stablehlo.reduce_window": "use a dot with a triangle of ones in place of a cumsum",
    "stablehlo.dynamic_slice": _STATIC,
    "stablehlo.dynamic_update_slice": _STATIC,
    "stablehlo.rng": _RANDOM,
    "stablehlo.rng_bit_generator": _RANDOM,
    "stablehlo.xor": _RANDOM,
}


def problems(operation) -> Iterator[str]:
    """What is wrong with an MLIR operation, a sentence each."""
    name = operation.name
    if name == "stablehlo.custom_call":
        target = ir.StringAttr(operation.attributes["call_target_name"]).value
        yield f"stablehlo.custom_call of {target}: a plain backend does not have it"
    elif name not in PLAIN:
        advice = _INSTEAD.get(name)
        yield f"{name} is not a plain operation" + (f"; {advice}" if advice else "")
    if name in _RULES:
        yield from _RULES[name](operation)
    yield from _type_problems(operation)


def _type_problems(operation) -> Iterator[str]:
    blocks = [block for region in operation.regions for block in region.blocks]
    values = [*operation.results, *(argument for block in blocks for argument in block.arguments)]
    for value in values:
        if not isinstance(value.type, ir.RankedTensorType) or not value.type.has_static_shape:
            yield f"{operation.name} has the type {value.type}; expected a static shape"


def _reduce_problems(operation) -> Iterator[str]:
    operands = len(operation.operands) // 2  # each has its initial value
    if operands != 1:
        yield (
            f"stablehlo.reduce has {operands} operands; expected 1 (in place of argmax a "
            "max-reduce, then a min-reduce of the indices that equal it)"
        )


def _gather_problems(operation) -> Iterator[str]:
    numbers = stablehlo.GatherDimensionNumbers(operation.attributes["dimension_numbers"])
    sizes = list(ir.DenseI64ArrayAttr(operation.attributes["slice_sizes"]))
    axes = list(numbers.start_index_map)
    operand, indices = (value.type for value in operation.operands)
    single_axis = (
        len(axes) == 1
        and list(numbers.collapsed_slice_dims) == axes
        and sizes[axes[0]] == 1
        and numbers.index_vector_dim == ir.RankedTensorType(indices).rank - 1
        and not list(numbers.operand_batching_dims)
    )
    if not single_axis:
        yield (
            f"stablehlo.gather of {operand} is not along one axis "
            f"({str(numbers).removeprefix('#stablehlo.gather')}, slice sizes {sizes}); use "
            'jnp.take(mode="clip")'
        )


def _composite_problems(operation) -> Iterator[str]:
    name = ir.StringAttr(operation.attributes["name"]).value
    if not name.startswith(COMPOSITES):
        advice = _INSTEAD.get(name)
        yield (
            f"stablehlo.composite {name}: expected only {COMPOSITES}*"
            f"{f'; {advice}' if advice else ''}"
        )


_RULES = {
    "stablehlo.reduce": _reduce_problems,
    "stablehlo.gather": _gather_problems,
    "stablehlo.composite": _composite_problems,
}
