"""Latent and shared experts against NemotronHMoE with Qwen3-MoE's parts, and what that can tell."""

import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from moe_jax.config import Qwen3MoeConfig
from moe_jax.decoder import StepOptions, moe_block
from moe_jax.experts import EXPERTS_BACKENDS, ExpertWeights, SharedExperts, experts
from moe_jax.modules import SparseMoe, params_of
from moe_jax.platforms import resolve_platform
from tests.moe_jax.goldens.cases import BASE, replace_keys
from tests.moe_jax.goldens.latent_cases import LATENT_CASES, LatentCase
from tests.moe_jax.parity import golden
from tests.moe_jax.parity.golden import TOLERANCE, assert_close

DIRECTORY = golden.DIRECTORY / "latent"
# bfloat16 is another suite's: what is left is XLA's
FLOAT32 = [name for name, backend in EXPERTS_BACKENDS.items() if "float32" in backend.rel_error]
ROUTED = [name for name, case in LATENT_CASES.items() if case.routed]
DRAWN = [name for name, case in LATENT_CASES.items() if not case.routed]


class LatentGolden(NamedTuple):
    """One case and its file; the dicts are by name, as goldens/latent.py calls them."""

    case: LatentCase
    config: Qwen3MoeConfig
    weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    routing: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]


@functools.cache
def latent_golden(name: str) -> LatentGolden:
    parts = {field: {} for field in LatentGolden._fields[2:]}
    for key, tensor in load_file(DIRECTORY / f"{name}.safetensors").items():
        part, _, rest = key.partition(".")
        parts[part][rest] = tensor.astype(np.float32) if part == "weights" else tensor
    case = LATENT_CASES[name]
    config = Qwen3MoeConfig.from_hf(replace_keys(BASE, case.config))
    return LatentGolden(case=case, config=config, **parts)


def run_experts(arrays: dict, x, ids, expert_weights, **options) -> jax.Array:
    """moe_jax's experts of [B, S, H], the block's parameters by their names."""
    shared = [arrays.get(f"shared_experts.{p}_proj.weight") for p in ("gate", "up", "down")]
    y = experts(
        x.reshape(-1, x.shape[-1]),
        ExpertWeights(gate_up=arrays["experts.gate_up"], down=arrays["experts.down"]),
        ids,
        expert_weights,
        fc1_latent_proj=arrays.get("fc1_latent_proj.weight"),
        fc2_latent_proj=arrays.get("fc2_latent_proj.weight"),
        shared_experts=None if shared[0] is None else SharedExperts(*shared),
        **options,
    )
    return y.reshape(x.shape)


def run_block(config: Qwen3MoeConfig, arrays: dict, x, **options) -> jax.Array:
    """moe_jax's block of [B, S, H], router included, with exactly these parameters."""
    block = SparseMoe(config, rngs=None, dtype=jnp.float32)
    params = dict(nnx.to_flat_state(nnx.state(block, nnx.Param)))
    assert {".".join(path) for path in params} == arrays.keys()
    held = {}
    for path, param in params.items():
        array = arrays[".".join(path)]
        assert param.shape == array.shape, path
        held[path] = param.replace(array)
    nnx.update(block, nnx.from_flat_state(held))
    options = StepOptions(config=config, platform=resolve_platform(), **options)
    return moe_block(params_of(block), x, jnp.ones(x.shape[:2], bool), options)[0]


def assert_gradients(y_of, names: list[str], arrays_of) -> None:
    """Those of sum(y * cotangent) are the goldens', each against its largest element.

    All cases are one program, because each would take as long to compile.

    Args:
      y_of: (golden, arrays) -> y.
      names: of the cases.
      arrays_of: golden -> what to differentiate by.
    """
    cases = [latent_golden(name) for name in names]

    def total(every):
        parts = zip(cases, every, strict=True)
        return sum(jnp.sum(y_of(found, a) * found.inputs["cotangent"]) for found, a in parts)

    every = [on_device(arrays_of(found)) for found in cases]
    for found, gradients in zip(cases, jax.jit(jax.grad(total))(every), strict=True):
        assert gradients.keys() == found.gradients.keys()
        for name, expected in found.gradients.items():
            scale = np.abs(expected).max()
            assert scale > 1e-3, name
            assert_close(gradients[name] / scale, expected / scale)


def assert_outputs(found: dict, cases: dict[str, LatentGolden]) -> None:
    for name, case in cases.items():
        np.testing.assert_allclose(
            found[name], case.outputs["y"], rtol=TOLERANCE, atol=TOLERANCE, err_msg=name
        )


def phase_of(case: LatentCase) -> str:
    return "decode" if case.S == 1 else "prefill"


def on_device(arrays: dict) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in arrays.items()}


@pytest.mark.parametrize("backend", FLOAT32)
def test_experts(backend):
    """All cases are one program, because each would take as long to compile."""

    def run(every):
        return {
            name: run_experts(
                weights,
                inputs["x"],
                routing["ids"],
                routing["weights"],
                backend=backend,
                phase=phase_of(LATENT_CASES[name]),
            )
            for name, (weights, inputs, routing) in every.items()
        }

    cases = {name: latent_golden(name) for name in LATENT_CASES}
    found = jax.jit(run)({name: (c.weights, c.inputs, c.routing) for name, c in cases.items()})
    assert_outputs(found, cases)


@pytest.mark.parametrize("backend", FLOAT32)
def test_gradients_of_experts(backend):
    def y_of(found, arrays):
        ids, options = found.routing["ids"], {"backend": backend, "phase": "training"}
        return run_experts(arrays, arrays["x"], ids, arrays["routing.weights"], **options)

    def arrays_of(found):
        more = {"x": found.inputs["x"], "routing.weights": found.routing["weights"]}
        return found.weights | more

    assert_gradients(y_of, [name for name in DRAWN if LATENT_CASES[name].gradients], arrays_of)


@pytest.mark.parametrize("backend", ["auto", *FLOAT32])
def test_block(backend):
    def run(every):
        ys = {}
        for name, (weights, x) in every.items():
            phase = phase_of(LATENT_CASES[name])
            config = cases[name].config
            ys[name] = run_block(config, weights, x, experts_backend=backend, phase=phase)
        return ys

    cases = {name: latent_golden(name) for name in ROUTED}
    assert_outputs(jax.jit(run)({n: (c.weights, c.inputs["x"]) for n, c in cases.items()}), cases)


def test_gradients_of_block():
    def y_of(found, arrays):
        weights = {name: array for name, array in arrays.items() if name != "x"}
        return run_block(found.config, weights, arrays["x"], phase="training")

    names = [name for name in ROUTED if LATENT_CASES[name].gradients]
    assert_gradients(y_of, names, lambda found: found.weights | {"x": found.inputs["x"]})


# What follows needs nothing of moe_jax: it shows that the goldens can tell wrong orders. Each
# mistake runs without an error for the cases that its condition picks.

_PROJECTIONS = {
    "fc1 dropped": lambda fc1, fc2: (np.eye(*fc1.shape), fc2),
    "fc2 dropped": lambda fc1, fc2: (fc1, np.eye(*fc2.shape)),
    "both dropped": lambda fc1, fc2: (np.eye(*fc1.shape), np.eye(*fc2.shape)),
    "swapped": lambda fc1, fc2: (fc2, fc1),
    "swapped, transposed": lambda fc1, fc2: (fc2.T, fc1.T),
    "fc1 transposed": lambda fc1, fc2: (fc1.T, fc2),
    "fc2 transposed": lambda fc1, fc2: (fc1, fc2.T),
}


def _equal(case: LatentCase) -> bool:
    return case.L == case.H


def _equal_shared(case: LatentCase) -> bool:
    return case.L == case.H and case.N is not None


def _shared(case: LatentCase) -> bool:
    return case.N is not None


MISTAKES = dict.fromkeys(_PROJECTIONS, _equal) | {
    "swapped, transposed": lambda case: case.L is not None,
    "router reads the latent": lambda case: _equal(case) and case.routed,
    "router reads through both": lambda case: case.L is not None and case.routed,
    "shared read the latent": _equal_shared,
    "shared added before fc2": _equal_shared,
    "shared dropped": _shared,
    "shared read the routed output": _shared,
    "shared gate and up swapped": _shared,
    "shared projected by fc2 too": _equal_shared,
    "expert weights normalised": lambda case: not case.routed,
    "expert weights dropped": lambda case: True,
    "experts' gate and up swapped": lambda case: True,
}


def plain(found: LatentGolden, mistake: str = "") -> np.ndarray:
    """The block in NumPy, every expert for every token, with one mistake."""
    case, arrays = found.case, found.weights
    x = found.inputs["x"].reshape(-1, case.H)
    ids, weights = found.routing["ids"], found.routing["weights"]
    fc1 = arrays.get("fc1_latent_proj.weight", np.eye(case.H))
    fc2 = arrays.get("fc2_latent_proj.weight", np.eye(case.H))
    fc1, fc2 = _PROJECTIONS.get(mistake, lambda fc1, fc2: (fc1, fc2))(fc1, fc2)
    z = x @ fc1.T

    if mistake == "router reads the latent":
        ids, weights = _route(case, z @ arrays["gate.weight"].T)
    if mistake == "router reads through both":
        ids, weights = _route(case, (z @ fc2.T) @ arrays["gate.weight"].T)
    if mistake == "expert weights normalised":
        weights = weights / weights.sum(axis=-1, keepdims=True)
    if mistake == "expert weights dropped":
        weights = np.ones_like(weights)

    gate, up = np.einsum("tl,ejil->jtei", z, arrays["experts.gate_up"])
    if mistake == "experts' gate and up swapped":
        gate, up = up, gate
    each = np.einsum("tei,eli->tel", _silu(gate) * up, arrays["experts.down"])
    chosen = ids[:, :, None] == np.arange(case.E)  # [T, K, E]
    y = np.einsum("tke,tk,tel->tl", chosen, weights, each)

    def shared(read):
        projections = [arrays[f"shared_experts.{p}_proj.weight"] for p in ("gate", "up", "down")]
        gate, up = (read @ projection.T for projection in projections[:2])
        if mistake == "shared gate and up swapped":
            gate, up = up, gate
        return (_silu(gate) * up) @ projections[2].T

    if case.N is None or mistake == "shared dropped":
        y = y @ fc2.T
    elif mistake == "shared added before fc2":
        y = (y + shared(x)) @ fc2.T
    elif mistake == "shared projected by fc2 too":
        y = y @ fc2.T + shared(x) @ fc2.T
    elif mistake == "shared read the latent":
        y = y @ fc2.T + shared(z)
    elif mistake == "shared read the routed output":
        y = y @ fc2.T
        y = y + shared(y)
    else:
        y = y @ fc2.T + shared(x)
    return y.reshape(found.inputs["x"].shape)


def _route(case: LatentCase, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and normalised weights [T, K] of the K largest logits."""
    ids = np.argsort(-logits, axis=-1)[:, : case.K]
    weights = np.exp(np.take_along_axis(logits, ids, axis=-1))
    return ids, weights / weights.sum(axis=-1, keepdims=True)


def _silu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh(x / 2)) / 2  # exp(-x) would overflow


@pytest.mark.parametrize("name", LATENT_CASES)
def test_without_a_mistake_it_is_the_golden(name):
    found = latent_golden(name)
    assert_close(plain(found), found.outputs["y"])


@pytest.mark.parametrize("name", ROUTED)
def test_the_router_read_the_full_hidden_state(name):
    found = latent_golden(name)
    logits = found.inputs["x"].reshape(-1, found.case.H) @ found.weights["gate.weight"].T
    ids, weights = _route(found.case, logits)
    np.testing.assert_array_equal(ids, found.routing["ids"])
    assert_close(weights, found.routing["weights"])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_goldens_can_tell(mistake):
    names = [name for name, case in LATENT_CASES.items() if MISTAKES[mistake](case)]
    assert names
    for name in names:
        found = latent_golden(name)
        y = found.outputs["y"]
        excess = np.abs(plain(found, mistake) - y) / (TOLERANCE * (1 + np.abs(y)))
        # not one unlucky element: half of all are wrong by far
        assert np.median(excess) > 30, name
        assert excess.max() > 1000, name


def test_files_are_those_of_the_table():
    manifest = json.loads((DIRECTORY / "manifest.json").read_text())
    made = {name: record["config"] for name, record in manifest["cases"].items()}
    assert made == {name: case.config for name, case in LATENT_CASES.items()}
    assert {file.stem for file in DIRECTORY.glob("*.safetensors")} == LATENT_CASES.keys()
    # one run made both
    for key in ("seed", "versions"):
        assert manifest[key] == golden.manifest()[key]


@pytest.mark.parametrize("name", LATENT_CASES)
def test_every_case_records_what_it_promises(name):
    found = latent_golden(name)
    case = found.case
    assert {key: array.shape for key, array in found.weights.items()} == case.shapes
    assert ("gate.weight" in found.weights) == case.routed
    assert bool(found.gradients) == ("cotangent" in found.inputs) == case.gradients
    assert (found.routing["ids"] == case.E).any() == (not case.routed)
