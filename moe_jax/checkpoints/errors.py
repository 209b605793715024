"""The one error that a checkpoint can be refused with, and how it lists what is wrong."""

_LISTED_PER_KIND = 8


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written as asked.

    Attributes:
      problems: every problem found, as (kind, line), where the error is about several.
    """

    def __init__(self, message: str, problems: tuple[tuple[str, str], ...] = ()):
        super().__init__(message)
        self.problems = problems


class Problems:
    """Collects what is wrong with a checkpoint, to raise all of it at once."""

    def __init__(self):
        self.found: list[tuple[str, str]] = []

    def add(self, kind: str, line: str) -> None:
        """Notes a problem; kind is "missing", "unexpected", "shape" and the like."""
        self.found.append((kind, line))

    def raise_if_any(self, where: str) -> None:
        """Raises a CheckpointError that lists the problems, each kind up to 8 lines and a count."""
        if not self.found:
            return
        by_kind: dict[str, list[str]] = {}
        for kind, line in self.found:
            by_kind.setdefault(kind, []).append(line)
        counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in by_kind.items())
        listed = []
        for kind, lines in by_kind.items():
            listed += [f"  {kind}: {line}" for line in lines[:_LISTED_PER_KIND]]
            if len(lines) > _LISTED_PER_KIND:
                listed.append(f"  {kind}: ... and {len(lines) - _LISTED_PER_KIND} more")
        total = f"{len(self.found)} problem{'s' if len(self.found) > 1 else ''} ({counts})"
        raise CheckpointError("\n".join([f"{where}: {total}", *listed]), tuple(self.found))
