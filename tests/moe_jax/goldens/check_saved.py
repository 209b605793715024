"""Loads the checkpoints that moe_jax saved by transformers, and compares what comes out.

    python tests/moe_jax/goldens/check_saved.py --goldens=DIR --saved=DIR

Each SAVED/SPELLING/NAME is a checkpoint directory of the case NAME, whose golden is in DIR. Runs in
the environment of make.py.
"""

import argparse
import pathlib
import sys

import oracle
import torch
from cases import CASES
from safetensors.torch import load_file


def main() -> None:
    """Prints how many directories are right; raises at the first that is not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--goldens", type=pathlib.Path, required=True)
    parser.add_argument("--saved", type=pathlib.Path, required=True)
    flags = parser.parse_args()
    directories = sorted(path.parent for path in flags.saved.glob("*/*/config.json"))
    if not directories:
        sys.exit(f"{flags.saved} holds no checkpoint of a case")
    for directory in directories:
        try:
            check(directory, flags.goldens / "cases" / f"{directory.name}.safetensors")
        except Exception as error:
            error.add_note(f"in {directory}")
            raise
    print(f"transformers reads all {len(directories)} saved checkpoints as the models they are")


def check(directory: pathlib.Path, golden: pathlib.Path) -> None:
    """Raises AssertionError unless the directory's model gives the golden's outputs."""
    parts = {"inputs": {}, "outputs": {}}
    for key, tensor in load_file(golden).items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    inputs = {name: tensor.numpy() for name, tensor in parts["inputs"].items()}
    found = oracle.forward(oracle.load(directory), CASES[directory.name], inputs)
    expected = {name: parts["outputs"][name] for name in found}
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


if __name__ == "__main__":
    main()
