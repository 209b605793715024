"""Mosaic's search for register layouts, part by part: seconds in place of a quarter of a minute.

Mosaic finds the layout of each vector in a kernel by a search under constraints. It looks at all
constraints again after each guess, so its time grows with the square of the kernel's size. A grid
of many tasks has many constraints, but no task shares a vector with another.

So the constraints are cut here into parts that share no vector, and Mosaic's own search solves each
part. A guess in one part cannot bear on another, so the layouts are those of the search as a whole.
"""

import functools
from collections.abc import Iterator

from jax.experimental.mosaic.gpu import constraints as cs
from jax.experimental.mosaic.gpu import layout_inference


class _Groups:
    """Sets of variables that grow together (union-find), in the order of their first members."""

    def __init__(self):
        self._parent = {}

    def find(self, variable):
        """The variable that stands for its group."""
        self._parent.setdefault(variable, variable)
        while self._parent[variable] != variable:
            # Halves the way for the next one who asks.
            self._parent[variable] = self._parent[self._parent[variable]]
            variable = self._parent[variable]
        return variable

    def join(self, variables) -> None:
        """Puts some variables into one group."""
        if variables:
            first = self.find(variables[0])
            for other in variables[1:]:
                self._parent[self.find(other)] = first

    def groups(self) -> dict:
        found = {}
        for variable in list(self._parent):
            found.setdefault(self.find(variable), []).append(variable)
        return found


def _equal_variables(system: cs.ConstraintSystem) -> dict:
    """Each variable of an equality -> all others that must be equal to it.

    Mosaic's own form sorts variables by their text, for which it prints the kernel once for each.
    """
    groups = _Groups()
    for constraint in system.constraints:
        match constraint:
            case cs.Equals(lhs=cs.Variable() as lhs, rhs=cs.Variable() as rhs):
                groups.join([lhs, rhs])
    return {
        variable: [other for other in group if other != variable]
        for group in groups.groups().values()
        for variable in group
    }


def _parts(unknowns, system: cs.ConstraintSystem) -> Iterator[tuple[list, list]]:
    """(unknown variables, constraints) of each part of a reduced system."""
    groups, of_constraint = _Groups(), []
    for variable in unknowns:
        groups.find(variable)
    for constraint in system.constraints:
        variables = cs.ConstraintSystem(constraints=[constraint]).unknowns()
        groups.join(variables)
        of_constraint.append(variables[0] if variables else None)
    constraints = {}
    for constraint, variable in zip(system.constraints, of_constraint, strict=True):
        key = None if variable is None else groups.find(variable)
        constraints.setdefault(key, []).append(constraint)
    wanted = set(unknowns)
    for key, group in groups.groups().items():
        own = [variable for variable in group if variable in wanted]
        yield own, constraints.get(key, [])


def _by_parts(search):
    """Mosaic's search, on each part by itself."""

    @functools.wraps(search)
    def find(unknowns, system, *, fuel, arch):
        reduced = cs.reduce(system)
        if isinstance(reduced, cs.Unsatisfiable):
            return reduced, fuel
        wanted = set(unknowns)
        found = {v: layout for v, layout in reduced.assignments.items() if v in wanted}
        left = [variable for variable in unknowns if variable not in reduced.assignments]
        for own, constraints in list(_parts(left, reduced)):
            part = cs.ConstraintSystem(constraints=constraints)
            solution, fuel = search(own, part, fuel=fuel, arch=arch)
            if isinstance(solution, cs.Unsatisfiable):
                return solution, fuel
            found |= solution
        return found, fuel

    return find


# Mosaic's own functions, which the tests compare with those that take their place.
REPLACED = {
    (cs, "compute_transitively_equal_vars"): cs.compute_transitively_equal_vars,
    (layout_inference, "find_assignments_for"): layout_inference.find_assignments_for,
}
cs.compute_transitively_equal_vars = _equal_variables
layout_inference.find_assignments_for = _by_parts(layout_inference.find_assignments_for)
