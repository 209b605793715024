"""How expert_major may cut its work: the config, its defaults, what is worth measuring, checks."""

import dataclasses

from pallas_kernels.decode_experts.configs import (
    check_block,
    check_num_stages,
    largest_divisor,
    valid_configs,
)
from pallas_kernels.decode_experts.expert_major_fp8 import (
    FP8_BLOCK_KS,
    FP8_MAX_BLOCK_N,
    fp8_stage_bytes,
)
from pallas_kernels.decode_experts.expert_major_kernels import BLOCK_KS, stage_bytes
from pallas_kernels.decode_experts.expert_schedule import (
    MAX_BLOCK_N,
    MIN_BLOCK_N,
    default_block_n,
)
from pallas_kernels.decode_experts.shapes import ExpertShapes
from pallas_kernels.decode_experts.swiglu_epilogue import product_rows
from pallas_kernels.decode_experts.token_tiles import WholeBatchTiles

_BLOCK_MS = (64, 128)
# Of blocks of gate/up and of down, by the weights' format.
NEURONS = {"bf16": (16, 32, 64), "fp8": (32, 64)}
DOWN_BLOCK_MS = {"bf16": (64, 128, 256), "fp8": (64, 128)}
_MIN_I_TO_FUSE = 512

# The default's three blocks a core in other forms, then four of them, then two with larger stages.
_FP8_CHANGES = [
    {"gate_up_neurons": 64, "gate_up_block_k": 128},
    {"down_block_m": 64, "down_block_k": 256, "down_num_stages": 2},
    {
        "gate_up_neurons": 64,
        "gate_up_block_k": 128,
        "gate_up_num_stages": 2,
        "down_num_stages": 2,
    },
    {"gate_up_neurons": 64, "gate_up_num_stages": 2, "down_block_k": 256, "down_num_stages": 2},
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertMajorConfig:
    """How expert_major cuts the work; nothing here changes a bit of a result on a GPU.

    FP8 weights take block_k of 128 or 256, and block_n up to 32.

    Attributes:
      gate_up_neurons: neurons of a gate/up block; 16, 32 or 64, with FP8 weights 32 or 64.
      gate_up_block_k: columns of x and gate_up in a stage; 64, 128 or 256, divides H.
      gate_up_num_stages: stages of gate/up. Fewer are used, and half or a quarter of their columns,
        where two blocks would not fit on a core otherwise.
      down_block_m: output neurons of a down block; 64, 128 or, of bf16 weights, 256; divides H.
      down_block_k: columns of hidden and down in a stage; 64, 128 or 256, divides I.
      down_num_stages: stages of down, likewise.
      block_n: rows of gathered tiles, a multiple of 8 up to 64; None takes default_block_n.
      fused: True for both products in one grid, False for two launches; None takes default_fused.
    """

    gate_up_neurons: int = 32
    gate_up_block_k: int = 256
    gate_up_num_stages: int = 3
    down_block_m: int = 128
    down_block_k: int = 128
    down_num_stages: int = 3
    block_n: int | None = None
    fused: bool | None = None


def default_fused(N: int, gathered: bool, I: int) -> bool:
    """Whether one grid was faster than two launches for tiles of N tokens (docs/lab.md).

    Wide tiles' stores of outputs cost more beside gate/up's reads. Where I is small, blocks of down
    are too short for each of them to wait for a counter.
    """
    return not gathered or (N == MIN_BLOCK_N and I >= _MIN_I_TO_FUSE)


def default_config(shapes: ExpertShapes, T: int) -> ExpertMajorConfig:
    """The heuristic: stages of 32 KB of weights, few enough that two blocks share a core.

    With FP8 weights it is three blocks, with converted tokens beside smaller stages. A few tokens
    leave room for larger ones.
    """
    if shapes.weights == "fp8":
        few = T <= 2
        return ExpertMajorConfig(
            gate_up_neurons=32,
            gate_up_block_k=largest_divisor(shapes.H, FP8_BLOCK_KS if few else FP8_BLOCK_KS[:1]),
            gate_up_num_stages=4 if few else 5,
            down_block_m=largest_divisor(shapes.H, _BLOCK_MS),
            down_block_k=128,
        )
    return ExpertMajorConfig(
        gate_up_block_k=largest_divisor(shapes.H, BLOCK_KS),
        down_block_m=largest_divisor(shapes.H, _BLOCK_MS),
        down_block_k=largest_divisor(shapes.I, _BLOCK_MS),
    )


def config_candidates(shapes: ExpertShapes, T: int) -> list[ExpertMajorConfig]:
    """Configs worth measuring, the default first, then what has won before.

    64 output neurons make twice the blocks, for few tokens; with narrow gate/up stages as well,
    three of them share a core. A shard's experts get fewer tokens than T and K let expect, because
    most ids are other shards': there narrow tiles may do. For gathered tiles of 8, one grid and two
    launches are within a percent or so, either way.
    """
    default = default_config(shapes, T)
    narrow = {"gate_up_block_k": largest_divisor(shapes.H, _BLOCK_MS)}
    changes = [{"down_block_m": 64, "down_num_stages": 4}, narrow | {"down_block_m": 64}]
    if shapes.weights == "fp8":
        changes = _FP8_CHANGES
    if default_block_n(T, shapes.K, shapes.E) > MIN_BLOCK_N:
        changes = [{"block_n": MIN_BLOCK_N}, *changes]
    elif not WholeBatchTiles.fit(T, shapes.K):
        changes = [{"fused": not default_fused(MIN_BLOCK_N, True, shapes.I)}, *changes]
    configs = [default, *(dataclasses.replace(default, **fields) for fields in changes)]
    if 32 < T <= 64 and (tall := tall_config(shapes)):
        configs.insert(2, tall)
    return valid_configs(check_config, configs, shapes)


def tall_config(shapes: ExpertShapes) -> ExpertMajorConfig | None:
    """For 33 to 64 tokens where some experts are popular; None for sizes that it does not fit.

    Popular experts have several tiles, and then L2 and not memory is the limit. Tiles of 16 are
    fewer, and tall blocks load their tokens and hidden less often.
    """
    tall = dataclasses.replace(
        default_config(shapes, T=64),
        gate_up_neurons=64,
        gate_up_block_k=largest_divisor(shapes.H, _BLOCK_MS),
        down_block_m=256,
        block_n=16,
        fused=True,
    )
    return next(iter(valid_configs(check_config, [tall], shapes)), None)


def check_config(config: ExpertMajorConfig, shapes: ExpertShapes) -> None:
    """Raises a ValueError that names the field if the config does not fit the layer's sizes."""
    c, H, I = config, shapes.H, shapes.I
    fp8 = shapes.weights == "fp8"
    block_ks, most_block_n = (FP8_BLOCK_KS, FP8_MAX_BLOCK_N) if fp8 else (BLOCK_KS, MAX_BLOCK_N)
    check_block("gate_up_neurons", c.gate_up_neurons, NEURONS[shapes.weights], "I", I)
    check_block("gate_up_block_k", c.gate_up_block_k, block_ks, "H", H)
    check_block("down_block_m", c.down_block_m, DOWN_BLOCK_MS[shapes.weights], "H", H)
    check_block("down_block_k", c.down_block_k, block_ks, "I", I)
    bytes_of = fp8_stage_bytes if fp8 else _stage_bytes
    for name, of_stage in bytes_of(c).items():
        check_num_stages(name, getattr(c, name), of_stage, least=2)
    if c.block_n is not None and c.block_n not in range(MIN_BLOCK_N, most_block_n + 1, MIN_BLOCK_N):
        raise ValueError(
            f"config.block_n is {c.block_n!r}; expected None or a multiple of {MIN_BLOCK_N} "
            f"up to {most_block_n}"
        )
    if not (c.fused is None or isinstance(c.fused, bool)):
        raise ValueError(f"config.fused is {c.fused!r}; expected None, True or False")


def _stage_bytes(c: ExpertMajorConfig) -> dict[str, int]:
    """Of bf16 weights and 8 tokens, by the field that says how many there are."""
    return {
        "gate_up_num_stages": stage_bytes(
            c.gate_up_block_k, product_rows(c.gate_up_neurons) + MIN_BLOCK_N
        ),
        "down_num_stages": stage_bytes(c.down_block_k, c.down_block_m + 2 * MIN_BLOCK_N),
    }
