"""--mesh as scripts take it: axes and their sizes, as in data=2,expert=4."""

from collections.abc import Sequence

from moe_jax.parallelism import Parallelism
from moe_jax.sharding import MESH_AXES, make_mesh

WHOLE_HEADS = "whole_heads"
MESH_HELP = f"Sizes of some of {', '.join(MESH_AXES)}, as in data=2,expert=4; empty: one device."


def sizes_of(parts: Sequence[str]) -> dict[str, int]:
    """The size of each axis that is named; ("data=2", "expert=4") -> {"data": 2, "expert": 4}.

    Raises:
      ValueError: a part is no axis=size, or an axis is named twice.
    """
    sizes: dict[str, int] = {}
    for part in parts:
        name, _, size = part.partition("=")
        if name not in MESH_AXES or not size.isdecimal() or int(size) < 1 or name in sizes:
            raise ValueError(
                f"--mesh has {part!r}; expected each of {', '.join(MESH_AXES)} once at most, with "
                "a size, as in data=2,expert=4"
            )
        sizes[name] = int(size)
    return sizes


def parallelism_of(parts: Sequence[str], **options) -> Parallelism | None:
    """Over the first devices; None without parts, for one device.

    Args:
      parts: as `sizes_of` takes them; among them WHOLE_HEADS leaves attention whole.
      options: Parallelism's.

    Raises:
      ValueError: as `sizes_of`, or there are fewer devices.
    """
    if WHOLE_HEADS in parts:
        parts = [part for part in parts if part != WHOLE_HEADS]
        options["split_heads"] = False
    return Parallelism(mesh=make_mesh(**sizes_of(parts)), **options) if parts else None
