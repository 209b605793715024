"""The golden files are those of the table of cases, whole, and small."""

from tests.moe_jax.goldens.cases import CASES
from tests.moe_jax.parity.golden import COMMITTED, DIRECTORY, golden, manifest

LIMIT = 4_000_000  # bytes of all that is committed


def test_every_case_of_the_table_was_made_with_its_config():
    # After a change to the table: python tests/moe_jax/goldens/make.py, or make parity.
    made = {name: record["config"] for name, record in manifest()["cases"].items()}
    assert made == {name: case.config_json for name, case in CASES.items()}


def test_files_are_those_of_the_manifest():
    cases = manifest()["cases"]
    found = {
        folder: {file.stem for file in (DIRECTORY / folder).iterdir()}
        for folder in ("cases", "weights")
    }
    assert found == {"cases": set(cases), "weights": {case["weights"] for case in cases.values()}}


def test_what_made_them_is_recorded():
    versions = manifest()["versions"]
    assert versions["transformers"] == "5.23.0"
    assert versions["torch"].startswith("2.13.0")
    assert versions.keys() == {"python", "numpy", "torch", "transformers", "safetensors"}
    assert isinstance(manifest()["seed"], int)


def test_committed_files_are_small():
    assert sum(file.stat().st_size for file in COMMITTED.rglob("*") if file.is_file()) < LIMIT


def test_every_case_records_what_it_promises():
    for name, case in CASES.items():
        inputs, outputs = golden(name).inputs, golden(name).outputs
        assert ("inputs_embeds" if case.embeds else "input_ids") in inputs, name
        assert ("attention_mask" in inputs) == bool(case.padding), name
        assert ("position_ids" in inputs) == bool(case.positions), name
        assert ("labels" in inputs) == ("loss" in outputs) == case.labels, name
        assert ("tokens" in outputs) == bool(case.new_tokens), name
        assert any(key.startswith("gradients") for key in outputs) == case.gradients, name
        recorded = sum(key.startswith("cached") for key in outputs)
        assert recorded == case.cached_differs * len(case.chunks), name
