"""Makes the goldens: runs every case through transformers and writes what came out.

    python tests/moe_jax/goldens/make.py --out=DIR --seed=N

DIR then holds manifest.json (seed, versions, and each case's config.json and weights),
weights/NAME.safetensors (hub keys, one file for each distinct set of shapes) and
cases/NAME.safetensors (inputs and expected tensors); DIR/latent holds the cases of latent and
shared experts, manifest.json and NAME.safetensors, weights included. It runs in an environment of
its own, Python 3.11 with numpy, torch, transformers and safetensors; the same seed gives the same
files.
"""

import argparse
import contextlib
import functools
import json
import pathlib
import platform

import draw
import fp8
import latent
import numpy as np
import oracle
import safetensors
import torch
import transformers
from cases import CASES, Case, replace_keys
from latent_cases import LATENT_CASES
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

ATTEMPTS = 50
# Between the oracle and itself: what must be the same, and what must not, element by element.
SAME = 1e-5
OTHER = 1e-2


def main() -> None:
    """Writes the files of every case; says which case it was that could not be made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    flags = parser.parse_args()
    for folder in ("weights", "cases", "latent"):
        (flags.out / folder).mkdir(parents=True, exist_ok=True)

    records, weights = {}, {}
    for case in CASES.values():
        if flags.only not in case.name:
            continue
        try:
            stored, loaded = checkpoint(case, flags.seed)
            key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in stored.items())
            if key not in weights:
                weights[key] = case.name
                save_file(stored, flags.out / "weights" / f"{case.name}.safetensors")
            tensors = expected(case, loaded, flags.seed)
        except Exception as error:
            error.add_note(f"in case {case.name}")
            raise
        save_file(tensors, flags.out / "cases" / f"{case.name}.safetensors")
        records[case.name] = {"weights": weights[key], "config": case.config_json}
        print(f"{case.name}: {len(tensors)} tensors", flush=True)

    write_manifest(flags.out, flags.seed, records)
    make_latent(flags.out / "latent", flags.seed, flags.only)


def make_latent(out: pathlib.Path, seed: int, only: str) -> None:
    """Writes the files of every case of latent and shared experts."""
    records = {}
    for case in LATENT_CASES.values():
        if only not in case.name:
            continue
        try:
            tensors = until_it_will_do(functools.partial(latent.expected, case, seed))
        except Exception as error:
            error.add_note(f"in case {case.name}")
            raise
        save_file(tensors, out / f"{case.name}.safetensors")
        records[case.name] = {"config": case.config}
        print(f"latent {case.name}: {len(tensors)} tensors", flush=True)
    write_manifest(out, seed, records)


def write_manifest(out: pathlib.Path, seed: int, records: dict) -> None:
    """One case a line."""
    cases = ",\n".join(f"{json.dumps(name)}: {json.dumps(records[name])}" for name in records)
    head = f'"seed": {seed},\n"versions": {json.dumps(versions())}'
    (out / "manifest.json").write_text(f'{{{head},\n"cases": {{\n{cases}\n}}}}\n')


def until_it_will_do(attempted):
    """What attempted(attempt) returns, for the first attempt that need not be drawn again."""
    for attempt in range(ATTEMPTS):
        with contextlib.suppress(oracle.DrawAgain):
            return attempted(attempt)
    raise ValueError(f"{ATTEMPTS} draws in a row would not do")


def versions() -> dict[str, str]:
    """Of everything that the numbers may depend on."""
    modules = (np, torch, transformers, safetensors)
    found = {module.__name__: module.__version__ for module in modules}
    return {"python": platform.python_version(), **found}


def checkpoint(case: Case, seed: int) -> tuple[dict, dict]:
    """The tensors to store, compact, and those that transformers loads, by hub key."""
    tensors = {
        key: torch.from_numpy(draw.weight(key, shape, seed))
        for key, shape in oracle.shapes(case.config_json).items()
    }
    if case.fp8 is None:
        return {key: tensor.half() for key, tensor in tensors.items()}, tensors
    *block, dtype = case.fp8
    stored = fp8.quantise(tensors, tuple(block), getattr(torch, dtype))
    loaded = fp8.dequantise(stored, tuple(block))
    for key in filter(fp8.is_quantised, stored):
        weight, scale = stored[key], stored[key + "_scale_inv"]
        # transformers infers the blocks from the shapes, which works where nothing is ragged
        if all(size % length == 0 for size, length in zip(weight.shape, block, strict=True)):
            theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
            torch.testing.assert_close(loaded[key], theirs, rtol=0, atol=0)
    return stored, loaded


def expected(case: Case, weights: dict, seed: int) -> dict[str, torch.Tensor]:
    """The case's inputs and outputs, as inputs.NAME and outputs.NAME, drawn until they will do."""
    model = oracle.model_of(case.config_json, weights)

    def attempted(attempt: int) -> dict[str, torch.Tensor]:
        inputs = draw.inputs(case, seed, attempt)
        outputs = run(model, case, inputs)
        check(case, weights, inputs, outputs)
        found = {f"inputs.{name}": torch.from_numpy(value) for name, value in inputs.items()}
        found |= {f"outputs.{name}": value.detach() for name, value in outputs.items()}
        return {
            name: (value if value.is_floating_point() else value.int()).clone().contiguous()
            for name, value in found.items()
        }

    return until_it_will_do(attempted)


def run(model, case: Case, inputs: dict) -> dict[str, torch.Tensor]:
    """Everything that the case records. Raises oracle.DrawAgain where other inputs are needed."""
    if case.new_tokens:
        tokens = oracle.generate(model, case, inputs)
        whole = torch.cat([torch.from_numpy(inputs["input_ids"]), tokens["tokens"]], dim=1)
        mask = inputs.get("attention_mask", np.ones_like(inputs["input_ids"]))
        mask = np.pad(mask, ((0, 0), (0, case.new_tokens)), constant_values=1)
        # the same tokens in one pass: it looks for ties, and shows that the cache changed nothing
        again = oracle.forward(
            model, case, {"input_ids": whole.int().numpy(), "attention_mask": mask}
        )["logits"][:, case.length - 1 : -1]
        assert_same(tokens["token_logits"], again)
        return tokens
    outputs = oracle.forward(model, case, inputs)
    if case.gradients:
        outputs |= oracle.gradients(model, outputs["loss"])
    valid = torch.from_numpy(inputs.get("attention_mask", np.ones((2, case.length)))) == 1
    for i, chunks in enumerate(case.chunks):
        logits = oracle.cached(model, case, inputs, chunks)
        if case.cached_differs:
            outputs[f"cached.{i}"] = logits
        else:
            assert_same(logits[valid], outputs["logits"][valid])
    return outputs


def check(case: Case, weights: dict, inputs: dict, outputs: dict) -> None:
    """The case shows what it says it shows; raises AssertionError if it does not."""
    for name, value in outputs.items():
        assert value.isfinite().all(), f"{name} is not finite"
    if case.new_tokens:
        return
    valid = inputs.get("attention_mask", np.ones((2, case.length), np.int32)) == 1
    logits = outputs["logits"]
    assert 0.3 < logits.std() < 10, f"logits have a standard deviation of {logits.std()}"
    for changed, same in ((case.same_as, True), (case.against, False)):
        if changed is None:
            continue
        other = oracle.model_of(replace_keys(case.config_json, changed), weights)
        theirs = oracle.forward(other, case, inputs)["logits"]
        if same:
            assert_same(theirs[valid], logits[valid])
        else:
            difference = (theirs - logits)[valid].abs().max()
            assert difference > OTHER, f"logits differ by {difference} only with {changed}"


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Two of the oracle's own results agree."""
    torch.testing.assert_close(found, expected, rtol=SAME, atol=10 * SAME)


if __name__ == "__main__":
    main()
