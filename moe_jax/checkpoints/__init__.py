"""Checkpoints: Hugging Face directories in and out, and Orbax.

    model = load_hugging_face("Qwen3-30B-A3B", shardings=expert_parallel(mesh))
    save_orbax("qwen3_30b_orbax", model)

A load checks everything first and lists all that does not fit in one CheckpointError. A save
replaces a directory whole or not at all. `Reader`, `open_checkpoint` and the write_* functions pass
a checkpoint through one parameter at a time, without a model.
"""

from moe_jax.checkpoints.change_format import quantised
from moe_jax.checkpoints.compare import differences
from moe_jax.checkpoints.errors import CheckpointError
from moe_jax.checkpoints.formats import Format, detect_format, open_checkpoint
from moe_jax.checkpoints.hugging_face_load import load_hugging_face, open_hugging_face
from moe_jax.checkpoints.hugging_face_save import save_hugging_face, write_hugging_face
from moe_jax.checkpoints.orbax import load_orbax, open_orbax, save_orbax, write_orbax
from moe_jax.checkpoints.readers import Reader

__all__ = [
    "CheckpointError",
    "Format",
    "Reader",
    "detect_format",
    "differences",
    "load_hugging_face",
    "load_orbax",
    "open_checkpoint",
    "open_hugging_face",
    "open_orbax",
    "quantised",
    "save_hugging_face",
    "save_orbax",
    "write_hugging_face",
    "write_orbax",
]
