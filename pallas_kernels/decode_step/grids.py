"""Which tasks share a grid: of a layer, and of a device's part of a layer."""

import dataclasses

from pallas_kernels.decode_experts.token_tiles import WholeBatchTiles
from pallas_kernels.decode_step.layer import (
    LayerConfig,
    LayerShapes,
    attention_tasks,
    experts_tasks,
    router_tasks,
)
from pallas_kernels.decode_step.tasks import Task


def grids(
    s: LayerShapes, config: LayerConfig, launches: str, num_parts: int
) -> dict[str, list[Task]]:
    """The tasks of each grid, in their order. More than 8 rows leave the experts to others.

    Args:
      s, config: of the layer.
      launches: as in decode_layers.
      num_parts: of what is added to x.
    """
    all_fit = WholeBatchTiles.fit(s.B, s.K)
    mailed = config.mailboxes and all_fit and launches == "layer"
    attention = attention_tasks(s, config, num_parts, mailed)
    router = router_tasks(s, mailed)
    if not all_fit:
        return {"decode_attention": [*attention, *router]}
    experts = experts_tasks(s, config, mailed)
    if launches == "layer":
        return {"decode_layer": [*attention, *router, *experts]}
    return {"decode_attention": attention, "decode_moe": [*router, *experts]}


def shard_grids(
    s: LayerShapes,
    config: LayerConfig,
    launches: str,
    heads_split: bool,
    stored: int,
    num_parts: int,
) -> dict[str, list[Task]]:
    """The same of a shard with `stored` experts; it may leave them to others with few rows, too.

    Where heads are split, o's products are added up between two grids.
    """
    one_grid = WholeBatchTiles.fit(s.B, s.K) and launches == "layer" and not heads_split
    mailed = config.mailboxes and one_grid
    *heads, add_2 = attention_tasks(s, config, num_parts, mailed)
    router = router_tasks(s, mailed, sharded=mailed)
    if mailed:
        experts = experts_tasks(s, config, mailed, stored)
        return {"decode_layer": [*heads, add_2, *router, *experts]}
    if not heads_split:
        return {"decode_attention": [*heads, add_2, *router]}
    add_2 = dataclasses.replace(add_2, work=dataclasses.replace(add_2.work, num_parts=1))
    return {"decode_heads": heads, "decode_router": [add_2, *router]}
