"""Has transformers read checkpoints that moe_jax saved, run them, and save them once more.

    PYTHON tests/moe_jax/checkpoints/hf_reads_ours.py FOLDER

PYTHON has numpy, torch, transformers and, for FP8, accelerate. For each FOLDER/NAME/ours, a
checkpoint directory, writes FOLDER/NAME/logits.npy (float32, of the tokens in FOLDER/ids.npy),
FOLDER/NAME/dtype.txt (what from_pretrained chose by itself), FOLDER/NAME/theirs (by
save_pretrained, in several files; not of FP8, which fails once it is dequantised) and
FOLDER/NAME/fused (the same with experts as version 5 holds them).
"""

import pathlib
import sys

import numpy as np
import torch
from transformers import Qwen3MoeForCausalLM


def main(folder: pathlib.Path) -> None:
    """Raises if from_pretrained misses a tensor, or meets one that it does not expect."""
    ids = torch.from_numpy(np.load(folder / "ids.npy"))
    for ours in sorted(folder.glob("*/ours")):
        model, report = Qwen3MoeForCausalLM.from_pretrained(
            ours,
            dtype="auto",
            output_loading_info=True,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        if any(report.values()):
            raise ValueError(f"{ours}: from_pretrained reports {report}")
        (ours.parent / "dtype.txt").write_text(str(model.dtype).removeprefix("torch."))
        if "quantization_config" not in (ours / "config.json").read_text():
            model.save_pretrained(ours.parent / "theirs", max_shard_size="3KB")
        model.save_pretrained(ours.parent / "fused", save_original_format=False)
        with torch.no_grad():
            logits = model.float().eval()(ids).logits
        np.save(ours.parent / "logits.npy", logits.numpy())


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
