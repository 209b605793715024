"""What a checkpoint says about its generation: generation_config.json, else config.json's eos."""

import dataclasses
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from moe_jax.generation.sampling import Sampling
from moe_jax.json_files import local_path, read_object

_warned: set[str] = set()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """How a checkpoint wants to be used.

    Attributes:
      sampling: how tokens are chosen.
      stop_ids: tokens that end a row.
      stop_strings: text that ends a row.
    """

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


# What transformers takes where do_sample is true and the file leaves a field out.
_ABSENT = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}

# The fields of Sampling that change greedy choices too, with what turns them off.
_ALWAYS = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": (),
    "suppress_tokens": (),
}

# Fields of transformers 5.23 that change what it generates and that nothing here does, with the
# values that change nothing. How long a row may become is left to max_new_tokens of the call.
_NOT_APPLIED = {
    "begin_suppress_tokens": ([],),
    "constraints": (),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0.0,),
    "remove_invalid_values": (False,),
    "sequence_bias": (),
    "token_healing": (False,),
    "watermarking_config": (),
}
_NOT_APPLIED_TO_DRAWS = {
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "typical_p": (1.0,),
}


def read_generation_defaults(
    directory: str | pathlib.Path, config: Mapping[str, Any] | None = None
) -> GenerationDefaults:
    """Reads a checkpoint's generation_config.json.

    Without the file choices are greedy. Without an eos_token_id in it, stop ids come from the
    model's config; without one there either, there are none. A warning names, once, the fields that
    change what transformers generates and that are not applied here.

    Args:
      directory: the checkpoint.
      config: what config.json holds; None reads the file.

    Raises:
      ValueError: a field has a value that it cannot have; the message names file and field.
      TypeError: directory is no path, or config no mapping.
    """
    path = local_path(directory, "directory") / "generation_config.json"
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(f"config is {config!r}; expected what config.json holds, or None")
    data = read_object(path)
    try:
        stop_ids, stop_strings, sampling = _stop_ids(data), _stop_strings(data), _sampling(data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    _warn_of_the_rest(path, data)
    if stop_ids is None:
        path = path.with_name("config.json")
        data = read_object(path) if config is None else config
        try:
            stop_ids = _stop_ids(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return GenerationDefaults(sampling=sampling, stop_ids=stop_ids or (), stop_strings=stop_strings)


def _sampling(data: Mapping[str, Any]) -> Sampling:
    do_sample = data.get("do_sample")
    if not isinstance(do_sample, bool | None):
        raise ValueError(f"do_sample is {do_sample!r}; expected true or false")
    absent = _ALWAYS | _ABSENT if do_sample else _ALWAYS
    return Sampling(
        **{
            name: default if data.get(name) is None else data[name]
            for name, default in absent.items()
        }
    )


def _warn_of_the_rest(path: pathlib.Path, data: Mapping[str, Any]) -> None:
    fields = _NOT_APPLIED | _NOT_APPLIED_TO_DRAWS if data.get("do_sample") else _NOT_APPLIED
    found = [
        f"{name} = {data[name]!r}"
        for name, neutral in fields.items()
        if data.get(name) is not None and data[name] not in neutral
    ]
    message = f"{path}: not applied here: {', '.join(found)}"
    if found and message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)


def _stop_strings(data: Mapping[str, Any]) -> tuple[str, ...]:
    value = data.get("stop_strings")
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop_strings is {value!r}; expected a string or a list of them")
    return tuple(strings)


def _stop_ids(data: Mapping[str, Any]) -> tuple[int, ...] | None:
    value = data.get("eos_token_id")
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    for id_ in ids:
        if isinstance(id_, bool) or not isinstance(id_, int) or id_ < 0:
            raise ValueError(f"eos_token_id is {value!r}; expected a token id or a list of them")
    return tuple(ids)
