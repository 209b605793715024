"""Which platform a computation is written for: chosen in Python, before anything is traced.

A platform is "cpu", "cuda", "ascend" or a name that this project has no rules for. Which one
comes, in this order, from an argument, from the environment variable MOE_JAX_PLATFORM, or from
JAX's default device. Naming another than JAX's own does not move the computation: it makes the
function that the named platform would get, to export it or to look at it.
"""

import os
import warnings
from collections.abc import Mapping

import jax

PLATFORM_VARIABLE = "MOE_JAX_PLATFORM"
ASCEND_NAMES_VARIABLE = "MOE_JAX_ASCEND_NAMES"

# What PJRT plugins for Huawei's NPUs call themselves, as far as is known: MOE_JAX_ASCEND_NAMES is
# for the day when that is known better.
_ASCEND_NAMES = "ascend,npu"
_OTHERS = ("cpu", "cuda")

_warned: set[str] = set()


def ascend_names(environment: Mapping[str, str] = os.environ) -> frozenset[str]:
    """The platform names, in lower case, that mean Ascend.

    "ascend" and "npu", or the comma-separated list in MOE_JAX_ASCEND_NAMES; "ascend" always does.

    Raises:
      ValueError: the list names a platform that has other rules.
    """
    listed = environment.get(ASCEND_NAMES_VARIABLE) or _ASCEND_NAMES
    names = {name.strip().casefold() for name in listed.split(",")} - {""}
    for taken in names & {*_OTHERS, "gpu"}:
        raise ValueError(
            f"{ASCEND_NAMES_VARIABLE} is {listed!r}; expected names of Ascend plugins, and "
            f"{taken!r} is another platform"
        )
    return frozenset(names | {"ascend"})


def resolve_platform(
    platform: str | None = None, *, environment: Mapping[str, str] = os.environ
) -> str:
    """The platform to write a computation for, in lower case.

    Args:
      platform: any spelling of a name; None takes MOE_JAX_PLATFORM, and without that JAX's default
        device. "gpu" means "cuda", and each of ascend_names() means "ascend".
      environment: where the variables are looked up.

    Returns:
      "cpu", "cuda", "ascend", or another name, for which the portable functions are taken; a
      warning says so once for each name.

    Raises:
      TypeError: platform is no name.
    """
    if not isinstance(platform, str | None):
        raise TypeError(f"platform is {platform!r}; expected a name, or None")
    name = platform or environment.get(PLATFORM_VARIABLE) or _of_jax()
    name = name.strip().casefold()
    if name == "gpu":
        return "cuda"
    if name in ascend_names(environment):
        return "ascend"
    if name not in _OTHERS and name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"platform {name!r} is none of {', '.join((*_OTHERS, *sorted(ascend_names())))}: "
            f"portable XLA is used. If it is an Ascend device, put its name into "
            f"{ASCEND_NAMES_VARIABLE}",
            stacklevel=2,
        )
    return name


def has_all_of_xla(platform: str) -> bool:
    """Whether what JAX lowers to is known to compile there: sorts, scatters, loops and all."""
    return platform in _OTHERS


def _of_jax() -> str:
    """JAX's own name of the default platform; "gpu" is NVIDIA's only."""
    name = jax.default_backend()
    if name == "gpu" and "NVIDIA" not in jax.devices()[0].device_kind.upper():
        return jax.devices()[0].client.platform
    return name
