"""Which weights of a model are BlockScaledFp8: what config.json's quantization_config says.

    quant_method            fp8
    fmt                     e4m3
    activation_scheme       dynamic; here activations keep the model's dtype
    weight_block_size       [rows, columns] that share a scale, [128, 128] by default
    scale_fmt               float, or ue8m0 where all scales are powers of two
    modules_to_not_convert  whose weights stay plain: beginnings, regexes or endings of names

A weight is quantised if it is a linear layer's or the experts', and no pattern names its module.
Router, norms, embeddings and head stay plain in every model.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pallas_kernels.block_scaled_fp8 import BLOCK

# A quantised parameter is two arrays, NAME.values and NAME.scales.
VALUES, SCALES = ".values", ".scales"


def split_name(name: str) -> tuple[str, str]:
    """An array's parameter, and which of its two arrays it is: VALUES, SCALES, or "" for plain."""
    ending = next((ending for ending in (VALUES, SCALES) if name.endswith(ending)), "")
    return name.removesuffix(ending), ending


_ACCEPTED = (
    "expected quant_method 'fp8' with fmt 'e4m3', activation_scheme 'dynamic', scale_fmt 'float' "
    "or 'ue8m0' and a weight_block_size of two positive integers"
)
# Field -> what it may be; the first is what a config without it means.
_FIELDS = {
    "quant_method": (None, ("fp8",)),
    "fmt": ("e4m3", ("e4m3",)),
    "activation_scheme": ("dynamic", ("dynamic",)),
    "scale_fmt": ("float", ("float", "ue8m0")),
    "expert_dtype": ("fp8", ("fp8",)),
}
_EXPERTS = re.compile(r"(layers\.\d+\.mlp\.experts)\.(gate_up|down)")


def block_of(quantization_config: Mapping | None) -> tuple[int, int] | None:
    """The (rows, columns) that share a scale, or None for a model that is not quantised.

    Raises:
      NotImplementedError: a quantisation other than FP8 in blocks.
    """
    if not quantization_config:
        return None
    for field, (default, accepted) in _FIELDS.items():
        found = quantization_config.get(field, default)
        if found not in accepted:
            raise NotImplementedError(f"quantization_config: {field} is {found!r}; {_ACCEPTED}")
    block = quantization_config.get("weight_block_size", BLOCK)
    whole = isinstance(block, (list, tuple)) and all(type(n) is int and n > 0 for n in block)
    if not whole or len(block) != 2:
        raise NotImplementedError(
            f"quantization_config: weight_block_size is {block!r}; {_ACCEPTED}"
        )
    return tuple(block)


def may_be_quantised(name: str) -> bool:
    """Whether a parameter is one that FP8 models quantise: the experts', or a linear layer's."""
    return name.endswith("_proj.weight") or _EXPERTS.fullmatch(name) is not None


def is_quantised(name: str, quantization_config: Mapping | None) -> bool:
    """Whether a parameter is BlockScaledFp8 in a model of this config.

    Raises:
      NotImplementedError: a quantisation other than FP8 in blocks, or patterns that are no regexes.
    """
    return (
        block_of(quantization_config) is not None
        and may_be_quantised(name)
        and not any(map(matcher_of(quantization_config), modules_of(name)))
    )


def modules_of(name: str) -> tuple[str, ...]:
    """Hugging Face's modules that hold a parameter: all experts as one, and the first by itself."""
    match = _EXPERTS.fullmatch(name)
    if not match:
        return (f"model.{name.removesuffix('.weight')}",)
    experts, kind = match.groups()
    parts = ("gate_proj", "up_proj") if kind == "gate_up" else ("down_proj",)
    return (f"model.{experts}", *(f"model.{experts}.0.{part}" for part in parts))


def matcher_of(quantization_config: Mapping) -> Callable[[str], bool]:
    """matches(module): whether modules_to_not_convert names it, by transformers' three rules.

    A pattern is the module's name up to a dot or its end, literally or as a regex, or its ending.
    """
    return _matcher(_patterns(quantization_config))


@functools.lru_cache(maxsize=16)
def _matcher(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    found = [re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))") for pattern in patterns]

    @functools.cache  # a model asks for each of its modules whenever it is traced
    def matches(module: str) -> bool:
        return module.endswith(patterns) or any(pattern.match(module) for pattern in found)

    return matches


def _patterns(quantization_config: Mapping) -> tuple[str, ...]:
    """modules_to_not_convert, which some files call ignored_layers.

    Raises:
      NotImplementedError: it is no list of regexes.
    """
    field = "modules_to_not_convert"
    if quantization_config.get(field) is None:
        field = "ignored_layers"
    patterns = quantization_config.get(field) or ()
    try:
        if isinstance(patterns, str):
            raise TypeError("a string")
        for pattern in patterns:
            re.compile(pattern)
    except (TypeError, re.error) as error:
        raise NotImplementedError(
            f"quantization_config: {field} is {patterns!r} ({error}); expected a list of regexes"
        ) from None
    return tuple(patterns)


def fp8_config(moe_layers: Iterable[int], block: tuple[int, int] = BLOCK) -> dict[str, Any]:
    """The quantization_config of a model whose every linear layer and expert is FP8."""
    routers = [f"model.layers.{layer}.mlp.gate" for layer in moe_layers]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
        "modules_to_not_convert": ["lm_head", *routers],
    }


def naming_plain(
    quantization_config: Mapping, plain: Iterable[str], moe_layers: Iterable[int]
) -> Mapping:
    """The same, with modules_to_not_convert that names the module of each parameter in `plain`.

    Args:
      quantization_config: of any FP8 model.
      plain: names of parameters that may be quantised and are not.
      moe_layers: the model's, whose routers a new list names too.
    """
    unnamed = [name for name in plain if is_quantised(name, quantization_config)]
    if not unnamed:
        return quantization_config
    listed = _patterns(quantization_config) or fp8_config(moe_layers)["modules_to_not_convert"]
    modules = dict.fromkeys([*listed, *(modules_of(name)[0] for name in unnamed)])
    return {**quantization_config, "modules_to_not_convert": list(modules)}
