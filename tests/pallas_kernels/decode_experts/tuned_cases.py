"""Made-up tuned tables."""

import dataclasses
import json

import jax

from pallas_kernels.decode_experts import LAYOUTS, ExpertShapes

DEVICE = "NVIDIA H100 80GB HBM3"
SHAPES = ExpertShapes(E=4, K=2, H=128, I=128)


def make_row(
    T: int, layout: str = "expert_major", us: float = 50.0, weights: str = "bf16", **fields
) -> dict:
    """One entry; `fields` replace some of the layout's default config."""
    shapes = dataclasses.replace(SHAPES, weights=weights)
    config = dataclasses.asdict(LAYOUTS[layout].default_config(shapes, T)) | fields
    return {
        "of": "made up",
        **dataclasses.asdict(shapes),
        "T": T,
        "layout": layout,
        "config": config,
        "us": us,
        "rel_error": 0.0016,
        "run": 0,
    }


def make_table(fastest: list[dict], invariant: list[dict] = (), **changes) -> dict:
    """The JSON value of a table; `changes` replace some of its fields."""
    table = {
        "format": 2,
        "device_kind": DEVICE,
        "jax": jax.__version__,
        "runs": [{"commit": "abc", "command": "made up", "date": "2026-11-25"}],
        "fastest": list(fastest),
        "invariant": list(invariant),
    }
    return table | changes


def write_table(folder, table, name: str = "h100.json") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(table if isinstance(table, str) else json.dumps(table))
