"""What a Hugging Face directory holds, compared with its config before any tensor is read."""

import dataclasses
import pathlib

import jax
import ml_dtypes
import numpy as np

from moe_jax.checkpoints import fp8, keys
from moe_jax.checkpoints.hugging_face_files import CONFIG, FLOATS, Found, config_of, tensors_of
from moe_jax.checkpoints.safetensors_file import FP8, StoredTensor
from moe_jax.config import Qwen3MoeConfig
from moe_jax.parameters import parameter_shapes

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class HubFiles:
    """A Hugging Face directory that was found to fit its config.

    Attributes:
      config: with quantization_config None, as weights are dequantised when they are read.
      shapes: parameter name -> shape and dtype, in the model's order. The dtype is the file's, and
        bfloat16 for what is quantised.
      tensors: hub key -> where it lies.
      block: the (rows, columns) that share a scale, None if nothing is quantised.
    """

    config: Qwen3MoeConfig
    shapes: dict[str, jax.ShapeDtypeStruct]
    tensors: dict[str, StoredTensor]
    block: tuple[int, int] | None


def inspect(directory: str | pathlib.Path) -> HubFiles:
    """Reads config.json and every file's header, and compares them.

    Ignored, as by transformers: rotary inv_freq buffers, and files that the index does not name.
    lm_head.weight in the file of a tied model is accepted if it equals the embedding.

    Raises:
      CheckpointError: config.json or a file is missing, malformed or cut off, or a tensor is
        missing, unexpected, stored twice, or of the wrong shape or dtype. One error lists all.
      NotImplementedError: a quantisation other than FP8 in blocks.
    """
    directory = pathlib.Path(directory)
    config = config_of(directory)
    block = fp8.block_size(config.quantization_config)
    config = dataclasses.replace(config, quantization_config=None)
    found = tensors_of(directory)
    unused = dict(found.tensors)
    expected = parameter_shapes(config)
    shapes = {}
    for name in keys.in_layer_order(expected):
        shape = expected[name].shape
        dtype = _check_parameter(name, shape, block, found, unused)
        shapes[name] = jax.ShapeDtypeStruct(shape, dtype)
    if config.tie_word_embeddings and keys.EMBEDDING_KEY in found.tensors:
        _check_tied_head(found, unused)
    for key, tensor in unused.items():
        if not keys.is_ignored(key):
            line = f"{key} {list(tensor.shape)} in {tensor.path.name}"
            found.problems.add("unexpected", line)
    found.problems.raise_if_any(f"{directory} does not fit its {CONFIG}")
    return HubFiles(config, shapes, found.tensors, block)


def _check_parameter(
    name: str,
    shape: tuple[int, ...],
    block: tuple[int, int] | None,
    found: Found,
    unused: dict[str, StoredTensor],
) -> np.dtype:
    """Takes a parameter's tensors out of `unused`; the dtype to read the parameter as."""
    dtypes = set()
    for position, key in keys.hub_keys(name, shape).items():
        expected, tensor = list(shape[len(position) :]), unused.pop(key, None)
        if tensor is None:
            if key not in found.explained:
                found.problems.add("missing", f"{key}; expected {expected}")
            continue
        where = f"{key} in {tensor.path.name}"
        if list(tensor.shape) != expected:
            line = f"{where} is {list(tensor.shape)}; expected {expected}"
            found.problems.add("shape", line)
        accepted = ", ".join(FLOATS.values())
        if tensor.dtype in FLOATS:
            dtypes.add(tensor.dtype)
        elif block is None:
            line = f"{where} is {tensor.dtype_name}; expected {accepted}"
            found.problems.add("dtype", line)
        elif not fp8.may_be_quantised(key) or tensor.dtype != FP8:
            line = (
                f"{where} is {tensor.dtype_name}; expected {accepted}, or F8_E4M3 if *_proj.weight"
            )
            found.problems.add("dtype", line)
        else:
            _check_scale(key, tensor, block, found, unused)
            dtypes.add(_BFLOAT16)
    if len(dtypes) > 1:
        line = ", ".join(sorted(FLOATS[dtype] for dtype in dtypes))
        found.problems.add("dtype", f"the tensors of {name} are {line}; expected one dtype")
    return dtypes.pop() if dtypes else _BFLOAT16


def _check_scale(
    key: str,
    tensor: StoredTensor,
    block: tuple[int, int],
    found: Found,
    unused: dict[str, StoredTensor],
) -> None:
    scale_key = fp8.scale_key(key)
    scale = unused.pop(scale_key, None)
    if scale is None:
        if scale_key not in found.explained:
            line = f"{scale_key}, the scales of {key} in {tensor.path.name}"
            found.problems.add("missing", line)
        return
    where = f"{scale_key} in {scale.path.name}"
    if scale.dtype not in FLOATS:
        accepted = ", ".join(FLOATS.values())
        found.problems.add("dtype", f"{where} is {scale.dtype_name}; expected {accepted}")
    if len(tensor.shape) == 2 and scale.shape != fp8.scale_shape(tensor.shape, block):
        expected = list(fp8.scale_shape(tensor.shape, block))
        found.problems.add("shape", f"{where} is {list(scale.shape)}; expected {expected}")


def _check_tied_head(found: Found, unused: dict[str, StoredTensor]) -> None:
    """A tied model reads the embedding; a head that says something else would be lost unseen."""
    head, embedding = unused.pop(keys.HEAD_KEY, None), found.tensors[keys.EMBEDDING_KEY]
    if head is None:
        return
    readable = embedding.dtype in FLOATS and len(embedding.shape) == 2
    same = readable and (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if not same or not _equal_bits(head, embedding):
        found.problems.add(
            "unexpected",
            f"{keys.HEAD_KEY} in {head.path.name} differs from {keys.EMBEDDING_KEY}, and "
            "tie_word_embeddings is true",
        )


def _equal_bits(one: StoredTensor, other: StoredTensor) -> bool:
    """Compares two matrices of one shape and dtype, 1024 rows at a time."""
    first, second = one.view(), other.view()
    rows = one.shape[0]
    blocks = [slice(start, min(start + 1024, rows)) for start in range(0, rows, 1024)]
    return all(
        np.array_equal(first[block].view(np.uint8), second[block].view(np.uint8))
        for block in blocks
    )
