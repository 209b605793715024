"""What a checkpoint says about its generation: generation_config.json, else config.json's eos."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from moe_jax.generation.sampling import Sampling
from moe_jax.json_files import local_path, read_object


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """How a checkpoint wants to be used; `stop_ids` ends a row."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()


# What transformers takes where do_sample is true and the file leaves a field out.
_ABSENT = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}


def read_generation_defaults(
    directory: str | pathlib.Path, config: Mapping[str, Any] | None = None
) -> GenerationDefaults:
    """Reads a checkpoint's generation_config.json.

    Without the file choices are greedy. Without an eos_token_id in it, stop ids come from the
    model's config; without one there either, there are none.

    Args:
      directory: the checkpoint.
      config: what config.json holds; None reads the file.

    Raises:
      ValueError: a field has a value that it cannot have; the message names file and field.
    """
    path = local_path(directory, "directory") / "generation_config.json"
    data = read_object(path)
    try:
        stop_ids, sampling = _stop_ids(data), _sampling(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if stop_ids is None:
        path = path.with_name("config.json")
        data = read_object(path) if config is None else config
        try:
            stop_ids = _stop_ids(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return GenerationDefaults(sampling=sampling, stop_ids=stop_ids or ())


def _sampling(data: Mapping[str, Any]) -> Sampling:
    do_sample = data.get("do_sample") or False
    if not isinstance(do_sample, bool):
        raise ValueError(f"do_sample is {do_sample!r}; expected true or false")
    penalty = data.get("repetition_penalty")
    fields = {"repetition_penalty": 1.0 if penalty is None else penalty}
    if do_sample:
        for name, absent in _ABSENT.items():
            fields[name] = data[name] if data.get(name) is not None else absent
    return Sampling(**fields)


def _stop_ids(data: Mapping[str, Any]) -> tuple[int, ...] | None:
    value = data.get("eos_token_id")
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    for id_ in ids:
        if isinstance(id_, bool) or not isinstance(id_, int) or id_ < 0:
            raise ValueError(f"eos_token_id is {value!r}; expected a token id or a list of them")
    return tuple(ids)
