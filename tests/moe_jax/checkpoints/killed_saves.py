"""Saves that are killed, each at another line of its code, over a checkpoint that must survive.

    python -m tests.moe_jax.checkpoints.killed_saves FOLDER FORMAT:STRIDE ...

For each FORMAT, puts checkpoint 0 into place, then forks a process that replaces it by checkpoint 1
and ends itself by SIGKILL at line STRIDE, 2 * STRIDE, ... that it executes of the files below,
until one gets through. Prints by FORMAT, for every kill, which checkpoint is there afterwards (null
if it is neither). JAX starts no backend in the process that forks.
"""

import json
import os
import pathlib
import shutil
import signal
import sys

import jax
import numpy as np

from moe_jax.checkpoints import (
    Reader,
    differences,
    open_checkpoint,
    write_hugging_face,
    write_orbax,
)
from moe_jax.config import Qwen3MoeConfig
from tests.moe_jax.checkpoints import hub

TRACED = (
    "moe_jax/checkpoints/hugging_face_save.py",
    "moe_jax/checkpoints/orbax.py",
    "moe_jax/checkpoints/replace_directory.py",
    "moe_jax/checkpoints/safetensors_file.py",
)


def reader(number: int) -> Reader:
    """A tiny checkpoint of one layer whose arrays are full of `number`, of its own vocabulary."""
    config = hub.config(num_hidden_layers=1, mlp_only_layers=[], num_experts=2)
    config["vocab_size"] = 32 + number
    H, D, E, I = 16, 12, 2, 8
    shapes = {
        "embed_tokens.weight": (config["vocab_size"], H),
        "layers.0.input_layernorm.weight": (H,),
        "layers.0.post_attention_layernorm.weight": (H,),
        "layers.0.self_attn.q_proj.weight": (2 * D, H),
        "layers.0.self_attn.k_proj.weight": (D, H),
        "layers.0.self_attn.v_proj.weight": (D, H),
        "layers.0.self_attn.o_proj.weight": (H, 2 * D),
        "layers.0.self_attn.q_norm.weight": (D,),
        "layers.0.self_attn.k_norm.weight": (D,),
        "layers.0.mlp.gate.weight": (E, H),
        "layers.0.mlp.experts.gate_up": (E, 2, I, H),
        "layers.0.mlp.experts.down": (E, H, I),
        "norm.weight": (H,),
        "lm_head.weight": (config["vocab_size"], H),
    }
    return Reader(
        Qwen3MoeConfig.from_hf(config),
        {name: jax.ShapeDtypeStruct(shape, hub.BF16) for name, shape in shapes.items()},
        lambda name: np.full(shapes[name], number, hub.BF16),
    )


def save(directory: pathlib.Path, form: str, number: int) -> None:
    if form == "orbax":
        write_orbax(directory, reader(number), overwrite=True)
    else:
        write_hugging_face(directory, reader(number), overwrite=True, max_shard_bytes=1000)


def killed_at(line: int):
    """A trace function that ends this process before the line-th line of the traced files."""
    left = line

    def trace(frame, event, argument):
        nonlocal left
        if not frame.f_code.co_filename.endswith(TRACED):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def in_a_fork(work) -> int | None:
    """Runs work() in a forked process; what it returned, or None if it was killed."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None


def numbers_of(directories: list[pathlib.Path], form: str, answer: pathlib.Path) -> list:
    """The number of the checkpoint in each directory, None unless it is whole."""
    if form != "orbax":
        return [number_of(directory) for directory in directories]

    def look() -> int:
        # in one process for all, because JAX starts a backend in it
        numbers = []
        for directory in directories:
            found = open_checkpoint(directory)
            matching = [number for number in (0, 1) if not differences(reader(number), found)[0]]
            numbers.append(matching[0] if matching else None)
        answer.write_text(json.dumps(numbers))
        return 0

    assert in_a_fork(look) == 0
    return json.loads(answer.read_text())


def number_of(directory: pathlib.Path) -> int | None:
    """numbers_of a Hugging Face directory, read by the safetensors package, which is quicker."""
    (number,) = {float(value) for array in hub.read(directory).values() for value in array.flat}
    config = json.loads((directory / "config.json").read_text())
    expected = hub.shapes(config)
    whole = {key: array.shape for key, array in hub.read(directory).items()} == expected
    named = hub.read_index(directory).keys() == expected.keys()
    return int(number) if whole and named and config["vocab_size"] == 32 + number else None


def outcomes_of(folder: pathlib.Path, form: str, stride: int) -> dict:
    directory, first = folder / "places" / "saved", folder / "first"

    def prepare() -> int:
        save(first, form, 0)
        (first / "tokenizer.json").write_text("{}")
        return 0

    # Orbax starts threads, and a process with threads should not fork.
    assert in_a_fork(prepare) == 0
    seen, leftovers, line, code = [], 0, 0, None
    while code is None:
        line += stride
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(first, directory)

        def replace(line=line) -> int:
            sys.settrace(killed_at(line))
            save(directory, form, 1)
            return 0

        code = in_a_fork(replace)
        leftovers += len(os.listdir(directory.parent)) > 1
        assert (directory / "tokenizer.json").read_text() == "{}"
        seen.append(shutil.copytree(directory, folder / "seen" / str(line)))
    # What the killed ones left, each next one has removed.
    left = sorted(os.listdir(directory.parent))
    outcomes = numbers_of(seen, form, folder / "answer.json")
    return {"outcomes": outcomes, "leftovers": leftovers, "left": left, "code": code}


def main(folder: str, *asked: str) -> None:
    results = {}
    for form, stride in (item.split(":") for item in asked):
        results[form] = outcomes_of(pathlib.Path(folder, form), form, int(stride))
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
