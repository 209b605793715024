"""Which operations a StableHLO module is made of, and which of them a young backend may not have.

    found = census(exported.mlir_module())
    found.ops["stablehlo.dot_general"], found.composites, violations(found)

Every function, composite decomposition and region is walked, and each counts once, however often it
is called.
"""

import collections
import dataclasses
import re
from typing import Any

from jax.extend.mlir import ir
from jax.interpreters import mlir

from experiments.ascend.rules import problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Composite:
    """A named region, as it stands in the module.

    Attributes:
      name: "superkernel.moe_experts" for example.
      version: an integer.
      attributes: its options, as Python values.
    """

    name: str
    version: int
    attributes: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Census:
    """What a module holds.

    Attributes:
      ops: name -> how many, in alphabetical order.
      composites: in the module's order.
      broken: what breaks a rule -> the source lines that it comes from, "?" where unknown.
    """

    ops: dict[str, int]
    composites: tuple[Composite, ...]
    broken: dict[str, tuple[str, ...]]


def census(text: str) -> Census:
    """Counts the operations of a module and tries the rules on each.

    Args:
      text: StableHLO, as `jax.export.Exported.mlir_module()` returns it.

    Raises:
      ValueError: the text is no module that this jaxlib can parse, or one without functions.
    """
    ops = collections.Counter()
    composites: list[Composite] = []
    broken: dict[str, list[str]] = {}

    def visit(operation):
        ops[operation.name] += 1
        for problem in problems(operation):
            broken.setdefault(problem, []).append(_source_line(operation))
        if operation.name == "stablehlo.composite":
            composites.append(_composite(operation))
        return ir.WalkResult.ADVANCE

    with mlir.make_ir_context():
        _parsed(text).operation.walk(visit, ir.WalkOrder.PRE_ORDER)
    if "func.func" not in ops:
        raise ValueError("no StableHLO module that holds a function")
    return Census(
        ops=dict(sorted(ops.items())),
        composites=tuple(composites),
        broken={problem: tuple(lines) for problem, lines in broken.items()},
    )


def without_source_lines(text: str) -> str:
    """The module as this jaxlib prints it, for comparing two; raises what `census` does."""
    with mlir.make_ir_context():
        return _parsed(text).operation.get_asm(enable_debug_info=False)


def _parsed(text: str) -> ir.Module:
    try:
        return ir.Module.parse(text)
    except ir.MLIRError as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"no StableHLO module that can be parsed: {first_line}") from None


def violations(found: Census) -> list[str]:
    """A line for each rule that is broken; none if a plain backend can run the module."""
    return [
        f"{problem} ({len(lines)} times, first in {lines[0]})"
        for problem, lines in found.broken.items()
    ]


def _composite(operation) -> Composite:
    attributes = operation.attributes
    return Composite(
        name=ir.StringAttr(attributes["name"]).value,
        version=getattr(attributes.get("version"), "value", 0),  # absent where it is 0
        attributes={
            option.name: getattr(option.attr, "value", str(option.attr))
            for option in attributes.get("composite_attributes", ())
        },
    )


def _source_line(operation) -> str:
    """The innermost Python line in the operation's location."""
    found = re.search(r'"([^"]+\.py)":(\d+)', str(operation.location))
    return ":".join(found.groups()) if found else "?"
