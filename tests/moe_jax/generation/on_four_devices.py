"""What test_meshes.py checks, in a process of its own that has four CPU devices.

    python -m tests.moe_jax.generation.on_four_devices

with XLA_FLAGS=--xla_force_host_platform_device_count=4 and JAX_PLATFORMS=cpu.
"""

import dataclasses

import jax

from moe_jax.generation import decode, generate
from moe_jax.parameters import from_arrays
from moe_jax.sharding import Parallelism, make_mesh
from tests.moe_jax.tiny import TINY, random_arrays

CONFIG = dataclasses.replace(
    TINY,
    num_hidden_layers=2,
    mlp_only_layers=(0,),
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
    moe_latent_size=16,
    moe_shared_expert_intermediate_size=24,
)
PARAMS = random_arrays(CONFIG)
PROMPTS = [[5, 1, 7], [2]]


def tokens(arrays) -> list:
    return generate(from_arrays(CONFIG, arrays), PROMPTS, max_new_tokens=6).tokens


def check_generation() -> None:
    """Token for token what one device generates, and no step is compiled twice."""
    expected = tokens(PARAMS)
    for sizes in ({"expert": 4}, {"tensor": 2}, {"data": 2, "expert": 2}):
        arrays = Parallelism(mesh=make_mesh(**sizes), fsdp=False).place(PARAMS)
        before = decode.decode._cache_size()
        assert tokens(arrays) == expected, sizes
        assert decode.decode._cache_size() == before + 1, sizes


def main() -> None:
    assert len(jax.devices()) == 4
    check_generation()
    print("all good")


if __name__ == "__main__":
    main()
