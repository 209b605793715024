"""What a Hugging Face directory holds, compared with its config before any tensor is read."""

import dataclasses
import pathlib
import warnings
from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np

from moe_jax.checkpoints import fp8, keys
from moe_jax.checkpoints.hugging_face_files import CONFIG, FLOATS, Found, config_of, tensors_of
from moe_jax.checkpoints.safetensors_file import FLOAT64, FP8, StoredTensor
from moe_jax.config import Qwen3MoeConfig
from moe_jax.parameters import parameter_shapes
from moe_jax.quantization import (
    SCALES,
    VALUES,
    block_of,
    matcher_of,
    may_be_quantised,
    naming_plain,
)
from pallas_kernels.block_scaled_fp8 import scales_shape

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class HubFiles:
    """A Hugging Face directory that was found to fit its config.

    Attributes:
      config: quantization_config is None if no parameter is read as FP8, and otherwise names all
        modules whose weights are plain.
      shapes: array name -> shape, and the dtype to read it as, in the model's order.
      places: parameter name -> its leading indices -> where the rest of its dimensions lie.
      tensors: hub key -> where it lies.
      block: the (rows, columns) that share a scale, None if nothing is quantised.
    """

    config: Qwen3MoeConfig
    shapes: dict[str, jax.ShapeDtypeStruct]
    places: dict[str, dict[tuple[int, ...], keys.Place]]
    tensors: dict[str, StoredTensor]
    block: tuple[int, int] | None


def inspect(
    directory: pathlib.Path, dtype: np.dtype | None = None, *, dequantize: bool = False
) -> HubFiles:
    """Reads config.json and every file's header, and compares them.

    As transformers does: experts may be fused, a tied model may have its head alone, and rotary
    inv_freq buffers and files that the index does not name are ignored. So are layers beyond
    num_hidden_layers, with a warning. lm_head.weight beside the embedding of a tied model is
    accepted if the two are equal.

    Args:
      directory: where config.json is.
      dtype: of every plain parameter; None keeps each one's own.
      dequantize: whether FP8 parameters become plain, of bfloat16 if dtype is None.

    Raises:
      CheckpointError: config.json or a file is missing, malformed or cut off, or a tensor is
        missing, unexpected, stored twice, or of the wrong shape or dtype; scales are no finite
        numbers; a stacked parameter, or a layer's experts, are FP8 in parts. One error lists all.
      NotImplementedError: a quantisation other than FP8 in blocks.
    """
    config = config_of(directory)
    quantization_config = config.quantization_config
    block = block_of(quantization_config)
    config = dataclasses.replace(config, quantization_config=None)
    check = _Check(config, quantization_config, dtype, dequantize, tensors_of(directory))
    shapes, places = {}, {}
    held = check.layers()
    if held:
        skipped = check.layers_of_other_size(held)
        compared = dataclasses.replace(
            config, num_hidden_layers=min(held, config.num_hidden_layers)
        )
        expected = parameter_shapes(compared)
        for name in keys.in_layer_order(expected):
            if not name.startswith(skipped):
                shape = expected[name].shape
                places[name], stored_as = check.parameter(name, shape)
                if stored_as == FP8:
                    of_scales = scales_shape(shape, block)
                    shapes[name + SCALES] = jax.ShapeDtypeStruct(of_scales, np.float32)
                    shapes[name + VALUES] = jax.ShapeDtypeStruct(shape, FP8)
                else:
                    shapes[name] = jax.ShapeDtypeStruct(shape, dtype or stored_as)
        check.experts_of_one_format(shapes)
        check.tied_head()
        check.rest(skipped)
    check.found.problems.raise_if_any(f"{directory} does not fit its {CONFIG}")
    if held > config.num_hidden_layers:
        warnings.warn(
            f"{directory} holds layers 0 to {held - 1}; those from {config.num_hidden_layers} on "
            f"are not read, because num_hidden_layers is {config.num_hidden_layers}",
            stacklevel=4,  # who called load_hugging_face
        )
    if any(name.endswith(VALUES) for name in shapes):
        plain = filter(may_be_quantised, shapes)
        named = naming_plain(quantization_config, plain, config.moe_layers)
        config = dataclasses.replace(config, quantization_config=named)
    return HubFiles(config, shapes, places, check.found.tensors, block)


class _Check:
    """Compares what was found with a config, and collects the problems in `found`.

    Attributes:
      unused: the tensors that no parameter has been seen to need so far.
    """

    def __init__(
        self,
        config: Qwen3MoeConfig,
        quantization_config: Mapping | None,
        dtype: np.dtype | None,
        dequantize: bool,
        found: Found,
    ):
        self.config, self.dtype, self.dequantize, self.found = config, dtype, dequantize, found
        self.block = block_of(quantization_config)
        self.stays_plain = matcher_of(quantization_config or {})
        self.known = found.known
        self.unused = dict(found.tensors)

    def problem(self, kind: str, line: str) -> None:
        self.found.problems.add(kind, line)

    def layers(self) -> int:
        """How many layers the files hold; 0 if their keys are those of no Qwen3-MoE."""
        held, wanted = keys.layer_count(self.known), self.config.num_hidden_layers
        if not held:
            first = min(self.known, key=lambda key: ("layers." not in key, key), default=None)
            example = f", {first!r} for example" if first else ""
            self.problem(
                "keys",
                f"the files have {len(self.known)} tensors{example}; expected keys such as "
                "'model.layers.0.input_layernorm.weight'",
            )
        elif held < wanted:
            self.problem(
                "missing",
                f"all layers from {held} on; num_hidden_layers is {wanted}, and the files hold "
                f"layers 0 to {held - 1}",
            )
        return held

    def layers_of_other_size(self, held: int) -> tuple[str, ...]:
        """Beginnings of the parameters whose number of experts is not the config's.

        One problem tells of them, instead of one for each expert.
        """
        E, H = self.config.num_experts, self.config.hidden_size
        gates = {
            f"layers.{layer}.mlp.": self.found.tensors.get(f"model.layers.{layer}.mlp.gate.weight")
            for layer in range(min(held, self.config.num_hidden_layers))
            if self.config.is_moe_layer(layer)
        }
        other = {
            start: gate
            for start, gate in gates.items()
            if gate is not None and gate.shape[1:] == (H,) and gate.shape != (E, H)
        }
        if other:
            gate = next(iter(other.values()))
            self.problem(
                "experts",
                f"num_experts is {E}; the files have {gate.shape[0]} in {len(other)} layers, as "
                f"{gate.key} in {gate.path.name} is {list(gate.shape)}",
            )
        return tuple(f"{start}{part}" for start in other for part in ("gate.", "experts."))

    def parameter(
        self, name: str, shape: tuple[int, ...]
    ) -> tuple[dict[tuple[int, ...], keys.Place], np.dtype]:
        """Takes a parameter's tensors out of `unused`; where its parts lie, and its own dtype.

        The dtype of a parameter that stays quantised is FP8.
        """
        stored = self._stored(name, shape)
        dtypes = set()
        for key, expected in stored.shapes.items():
            tensor = self.unused.pop(key, None)
            if tensor is None:
                if key not in self.found.explained:
                    tied = "; tie_word_embeddings is false" if key == keys.HEAD_KEY else ""
                    self.problem("missing", f"{key}; expected {list(expected)}{tied}")
                continue
            if tensor.shape != expected:
                line = f"{key} in {tensor.path.name} is {list(tensor.shape)}"
                self.problem("shape", f"{line}; expected {list(expected)}")
            dtypes |= self._dtype(name, key, tensor)
        if FP8 in dtypes and self.dequantize:
            dtypes = dtypes - {FP8} | {_BFLOAT16}
        if len(dtypes) > 1 and (self.dtype is None or FP8 in dtypes):
            line = ", ".join(sorted(dtype.name for dtype in dtypes))
            way = "dequantize=True" if FP8 in dtypes else "dtype= to convert to"
            self.problem("dtype", f"the tensors of {name} are {line}; expected one dtype, or {way}")
        if FP8 in dtypes:
            return stored.places, FP8
        return stored.places, dtypes.pop() if dtypes else _BFLOAT16

    def experts_of_one_format(self, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """Both parameters of a layer's experts are FP8, or none."""
        for name, struct in shapes.items():
            experts, _, part = name.rpartition(".")
            other = {"gate_up": "down", "down": "gate_up"}.get(part)
            scaled = f"{experts}.{other}"
            if other and scaled + VALUES in shapes:
                self.problem(
                    "dtype",
                    f"{scaled} is {FP8.name} and {name} is {struct.dtype.name}; expected one "
                    "format, or dequantize=True",
                )

    def _stored(self, name: str, shape: tuple[int, ...]) -> keys.Stored:
        """Which of the ways to store a parameter the files have chosen."""
        if (key := keys.fused_key(name)) in self.known:
            single = [
                other for other in keys.hub_keys(name, shape).values() if other in self.unused
            ]
            if single:
                self.problem("duplicate", f"{key} and {len(single)} such as {single[0]}")
            for other in single:
                del self.unused[other]
            return keys.fused(name, shape)
        lacks_embedding = keys.EMBEDDING_KEY not in self.known and keys.HEAD_KEY in self.known
        stored = keys.apart(name, shape)
        if (
            self.config.tie_word_embeddings
            and lacks_embedding
            and keys.EMBEDDING_KEY in stored.shapes
        ):
            return keys.Stored({keys.HEAD_KEY: shape}, {(): keys.Place(keys.HEAD_KEY)})
        return stored

    def _dtype(self, name: str, key: str, tensor: StoredTensor) -> set[np.dtype]:
        """What the tensor is read as if no dtype is given; nothing if it cannot be read."""
        accepted = ", ".join(FLOATS.values())
        where = f"{key} in {tensor.path.name}"
        if tensor.dtype in FLOATS:
            return {tensor.dtype}
        if tensor.dtype == FLOAT64 and self.dtype is not None:
            return {self.dtype}
        if self.block is None:
            self.problem("dtype", f"{where} is {tensor.dtype_name}; expected {accepted}")
        elif not may_be_quantised(name) or tensor.dtype != FP8:
            self.problem(
                "dtype",
                f"{where} is {tensor.dtype_name}; expected {accepted}, or F8_E4M3 if *_proj.weight",
            )
        elif self.stays_plain(key.removesuffix(".weight")):
            self.problem(
                "dtype",
                f"{where} is {tensor.dtype_name}, and modules_to_not_convert names its module; "
                f"expected {accepted}",
            )
            self.unused.pop(keys.scale_key(key), None)
        else:
            self._scale(key, tensor)
            return {FP8}
        return set()

    def _scale(self, key: str, tensor: StoredTensor) -> None:
        scale_key = keys.scale_key(key)
        scale = self.unused.pop(scale_key, None)
        if scale is None:
            if scale_key not in self.found.explained:
                line = f"{scale_key}, the scales of {key} in {tensor.path.name}"
                self.problem("missing", line)
            return
        where = f"{scale_key} in {scale.path.name}"
        if scale.dtype not in fp8.SCALES:
            accepted = ", ".join(fp8.SCALES.values())
            self.problem("dtype", f"{where} is {scale.dtype_name}; expected {accepted}")
        if len(tensor.shape) < 2:
            return  # its shape is a problem already
        *stacked, rows, _ = tensor.shape
        if stacked and key.endswith("gate_up_proj") and rows // 2 % self.block[0]:
            self.problem(
                "shape",
                f"{key} in {tensor.path.name} is FP8 with {rows // 2} rows of gates; expected a "
                f"multiple of the block's {self.block[0]} rows, as ups must begin a block",
            )
            return
        expected = scales_shape(tensor.shape, self.block)
        if scale.shape != expected:
            self.problem("shape", f"{where} is {list(scale.shape)}; expected {list(expected)}")
        elif scale.dtype in fp8.SCALES:
            found = fp8.float32_scales(scale.view()[(slice(None),) * len(expected)])
            for at in np.argwhere(~np.isfinite(found))[:1].tolist():
                line = f"{where} is {found[tuple(at)]} at {at}; expected finite numbers"
                self.problem("scale", line)

    def tied_head(self) -> None:
        """A tied model reads the embedding; a head that differs would be lost unseen."""
        embedding = self.found.tensors.get(keys.EMBEDDING_KEY)
        if not self.config.tie_word_embeddings or embedding is None:
            return
        head = self.unused.pop(keys.HEAD_KEY, None)
        if head is None:
            return
        readable = embedding.dtype in FLOATS and len(embedding.shape) == 2
        same = readable and (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
        if not same or not _equal_bits(head, embedding):
            self.problem(
                "unexpected",
                f"{keys.HEAD_KEY} in {head.path.name} differs from {keys.EMBEDDING_KEY}, and "
                "tie_word_embeddings is true",
            )

    def rest(self, skipped: tuple[str, ...]) -> None:
        """What is still unused must be known to be of no use."""
        ignored = tuple(f"model.{start}" for start in skipped)
        for key, tensor in self.unused.items():
            beyond = keys.layer_of(key) >= self.config.num_hidden_layers
            if not beyond and not keys.is_ignored(key) and not key.startswith(ignored):
                line = f"{key} {list(tensor.shape)} in {tensor.path.name}"
                self.problem("unexpected", line)


def _equal_bits(one: StoredTensor, other: StoredTensor) -> bool:
    """Compares two matrices of one shape and dtype, 1024 rows at a time."""
    first, second = one.view(), other.view()
    rows = one.shape[0]
    blocks = [slice(start, min(start + 1024, rows)) for start in range(0, rows, 1024)]
    return all(
        np.array_equal(first[block].view(np.uint8), second[block].view(np.uint8))
        for block in blocks
    )
