"""safetensors files: what is read is what was written, FP8 too; damaged ones are refused."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_jax.checkpoints.safetensors_file import DamagedFileError, read_header, write_file
from tests.moe_jax.checkpoints import hub

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f"{np.dtype(dtype)}.{'x'.join(map(str, shape))}": (100 * rng.random(shape)).astype(dtype)
        for dtype in DTYPES
        for shape in [(3, 5), (7,), (2, 3, 4)]
    }


@pytest.mark.parametrize("save", [write_file, lambda path, tensors: save_file(tensors, path)])
def test_reads_what_was_written(tmp_path, save):
    path, written = tmp_path / "a.safetensors", arrays()
    save(path, written)
    found = read_header(path)
    whole = {
        key: np.asarray(tensor.view()[(slice(None),) * len(tensor.shape)])
        for key, tensor in found.items()
    }
    hub.expect_same(whole, written)
    assert {tensor.dtype for tensor in found.values()} == set(map(np.dtype, DTYPES))
    for key in ("float8_e4m3fn.3x5", "bfloat16.3x5"):
        assert hub.same(np.asarray(found[key].view()[1:3, 2:4]), written[key][1:3, 2:4])


def test_an_array_that_is_not_contiguous(tmp_path):
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_file(tmp_path / "a.safetensors", {"a": turned})
    assert hub.same(read_header(tmp_path / "a.safetensors")["a"].view()[:, :], turned.copy())


def test_a_file_that_takes_anothers_place_is_read_anew(tmp_path):
    path = tmp_path / "a.safetensors"
    for value in (1, 2):
        for dtype in (np.float32, ml_dtypes.float8_e4m3fn):
            write_file(path, {"a": np.full((2, 2), value, dtype)})
            assert np.all(np.asarray(read_header(path)["a"].view()[:, :], np.float32) == value)


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match=r"absent/a\.safetensors cannot be written"):
        write_file(tmp_path / "absent" / "a.safetensors", arrays())


def _write(path, header, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _entry(shape, begin, end, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"{", 0),
        (b"\xff\xff", 0),
        ([], 0),
        ({"a": 1}, 0),
        ({"a": _entry(3, 0, 12)}, 12),
        ({"a": _entry([-1], 0, 4)}, 4),
        ({"a": _entry([1], 0, 4), "b": _entry([1], 0, 4)}, 4),
        ({"a": _entry([1], 4, 8)}, 8),
        ({"a": _entry([2], 0, 4)}, 4),
        ({"a": _entry([2**40, 2**40], 0, 4)}, 4),
        ({"a": _entry([2], 0, 8)}, 7),
        ({"a": _entry([2], 0, 8)}, 9),
        (
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            2,
        ),
    ],
)
def test_damaged_headers(tmp_path, header, data):
    path = tmp_path / "a.safetensors"
    _write(path, header, bytes(data))
    with pytest.raises(DamagedFileError, match=f"cut off, at {path.stat().st_size} bytes: Error"):
        read_header(path)


@pytest.mark.parametrize(
    "content", [b"", b"\x10\x00", struct.pack("<Q", 100) + b"{}", b"\xff" * 20]
)
def test_what_is_no_such_file(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=f"cut off, at {len(content)} bytes"):
        read_header(path)
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "absent")


def test_a_dtype_that_is_not_read_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": np.ones(3, np.int64)}, path)
    assert read_header(path)["a"].dtype is None
    assert read_header(path)["a"].dtype_name == "I64"
