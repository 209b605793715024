"""What decode_layer accepts: shapes, dtypes and sizes, each with an error that names it."""

import dataclasses
import numbers

import jax.numpy as jnp

from pallas_kernels.block_scaled_fp8 import BLOCK, VALUES_DTYPE, check_block_scaled_fp8, is_fp8
from pallas_kernels.decode_attention.split_attention import MAX_GROUP
from pallas_kernels.decode_experts.configs import check_num_stages
from pallas_kernels.decode_experts.expert_major_config import DOWN_BLOCK_MS, NEURONS
from pallas_kernels.decode_experts.expert_major_fp8 import FP8_BLOCK_KS, fp8_stage_bytes
from pallas_kernels.decode_experts.expert_major_kernels import BLOCK_KS, stage_bytes
from pallas_kernels.decode_experts.swiglu_epilogue import product_rows
from pallas_kernels.decode_experts.token_tiles import WholeBatchTiles
from pallas_kernels.decode_step.layer import PRODUCTS, LayerConfig, LayerShapes
from pallas_kernels.mosaic.fp8_product import OPERAND_BYTES
from pallas_kernels.mosaic.operands import expect_array, round_up

MAX_ROWS = 64
SLOTS_MULTIPLE = 64  # of a row of the cache
HEAD_DIM = 128
MAX_SPREAD_NS = 1_000_000  # see mosaic.grid_sync.pause
INSTEAD = "reference_decode_layer"


def check_layers(
    residual, weights, caches, positions, K, eps, norm_topk_prob, shard
) -> LayerShapes:
    """What check_inputs says of each layer; a ValueError if one is unlike the first, or none is.

    Arguments as decode_layers'.
    """
    if not weights or len(weights) != len(caches):
        raise ValueError(
            f"weights and caches are of {len(weights)} and {len(caches)} layers; expected as many "
            "of each, and at least one"
        )
    expected = None
    for index, (own, cache) in enumerate(zip(weights, caches, strict=True)):
        s = check_inputs(
            residual, own, *cache, positions, K, eps, norm_topk_prob, shard is not None
        )
        expected = expected or s
        for field in dataclasses.fields(s):
            value, first = getattr(s, field.name), getattr(expected, field.name)
            if value != first:
                raise ValueError(
                    f"{field.name} of layer {index} is {value}; expected {first} as of layer 0"
                )
    return expected


def check_inputs(
    residual, weights, keys, values, positions, K, eps, norm_topk_prob, sharded: bool = False
) -> LayerShapes:
    """The sizes, or ValueError, TypeError or NotImplementedError where an input is not accepted.

    Arguments as decode_layer's; `sharded` is whether the experts may be fewer than the router's.
    """
    letters = {
        "input_layernorm": "[H]", "q_proj": "[heads*D, H]", "k_proj": "[kv*D, H]",
        "v_proj": "[kv*D, H]", "q_norm": "[D]", "k_norm": "[D]", "o_proj": "[H, heads*D]",
        "post_attention_layernorm": "[H]", "gate": "[E, H]", "gate_up": "[E, 2, I, H]",
        "down": "[E, H, I]",
    }  # fmt: skip
    fp8 = tuple(product for product in PRODUCTS if _is_quantised(product, weights, letters))
    scaled = {field for product in fp8 for field in PRODUCTS[product]}
    for field, shape in letters.items():
        if field not in scaled:
            value = getattr(weights, field)
            expect_array(f"weights.{field}", value, shape, jnp.bfloat16, instead=INSTEAD)
    expect_array("residual.x", residual.x, "[N, H]", jnp.bfloat16, instead=INSTEAD)
    for name, value in (("keys", keys), ("values", values)):
        expect_array(name, value, "[B, kv, C, D]", jnp.bfloat16, instead=INSTEAD)
    for field, shape, dtype in (
        ("cos", "[B, D]", jnp.float32), ("sin", "[B, D]", jnp.float32),
        ("lengths", "[B]", jnp.int32), ("valid", "[B]", jnp.int32),
    ):  # fmt: skip
        value = getattr(positions, field)
        expect_array(f"positions.{field}", value, shape, dtype, instead=INSTEAD)
    parts = residual.parts
    if parts is not None:
        expect_array("residual.parts", parts, "[number, N, H]", jnp.float32, instead=INSTEAD)
    (N, H), (B, kv, C, D) = residual.x.shape, keys.shape
    stored, _, I, _ = weights.gate_up.shape
    E = weights.gate.shape[0] if sharded else stored
    heads = max(1, weights.q_proj.shape[0] // D)
    expected = {
        "weights.input_layernorm": (H,), "weights.q_proj": (heads * D, H),
        "weights.k_proj": (kv * D, H), "weights.v_proj": (kv * D, H), "weights.q_norm": (D,),
        "weights.k_norm": (D,), "weights.o_proj": (H, heads * D),
        "weights.post_attention_layernorm": (H,), "weights.gate": (E, H),
        "weights.gate_up": (stored, 2, I, H), "weights.down": (stored, H, I), "keys": (B, kv, C, D),
        "values": (B, kv, C, D), "positions.cos": (B, D), "positions.sin": (B, D),
        "positions.lengths": (B,), "positions.valid": (B,),
    }  # fmt: skip
    given = {"keys": keys, "values": values}
    given |= {f"weights.{name}": value for name, value in weights._asdict().items()}
    given |= {f"positions.{name}": value for name, value in positions._asdict().items()}
    if round_up(B, 8) != N:
        raise ValueError(
            f"residual.x has {N} rows; expected B = {B}, rounded up to a multiple of 8"
        )
    if parts is not None and parts.shape[1:] != (N, H):
        raise ValueError(f"residual.parts has shape {parts.shape}; expected [number, {N}, {H}]")
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise ValueError(f"{name} has shape {given[name].shape}; expected {shape}")
    of_H, of_I = (
        f"a multiple of {BLOCK[0]} with FP8 weights" if has_fp8 else "a multiple of 64"
        for has_fp8 in (bool(fp8), "experts" in fp8)
    )
    for name, value, accepted, fits in (
        ("B", B, f"1 to {MAX_ROWS}", B <= MAX_ROWS),
        ("D", D, f"{HEAD_DIM}", D == HEAD_DIM),
        ("C", C, f"a multiple of {SLOTS_MULTIPLE}", C % SLOTS_MULTIPLE == 0),
        ("H", H, of_H, H % (BLOCK[0] if fp8 else 64) == 0),
        ("I", I, of_I, I % (BLOCK[0] if "experts" in fp8 else 64) == 0),
        ("E", E, "a multiple of 8 up to 512", E % 8 == 0 and E <= 512),
        ("heads", heads, f"a multiple of kv = {kv}, {MAX_GROUP} times at most",
         heads % kv == 0 and heads <= MAX_GROUP * kv),
    ):  # fmt: skip
        if not fits:
            raise NotImplementedError(
                f"{name} is {value}; decode_layer takes {accepted}, {INSTEAD} any number"
            )
    is_count = isinstance(K, numbers.Integral) and not isinstance(K, bool)
    if not is_count or not 1 <= K <= min(E, 32):
        raise ValueError(f"K is {K}; expected 1 to {min(E, 32)}")
    if not isinstance(eps, numbers.Real) or not eps >= 0:
        raise ValueError(f"eps is {eps!r}; expected a number that is not negative")
    return LayerShapes(
        B=B, H=H, heads=heads, kv=kv, D=D, C=C, E=E, K=int(K), I=I, eps=float(eps),
        norm_topk_prob=bool(norm_topk_prob), fp8=fp8,
    )  # fmt: skip


def _is_quantised(product: str, weights, letters) -> bool:
    """Whether all of a product's weights are FP8; an error where some are, or are not as taken."""
    given = {field: getattr(weights, field) for field in PRODUCTS[product]}
    if not any(map(is_fp8, given.values())):
        return False
    for field, weight in given.items():
        name = f"weights.{field}"
        if not is_fp8(weight):
            others = " and ".join(f"weights.{other}" for other in given if is_fp8(given[other]))
            dtype = getattr(weight, "dtype", type(weight).__name__)
            raise NotImplementedError(
                f"{name} is {dtype} and {others} BlockScaledFp8; decode_layer takes all of "
                f"{', '.join(given)} in one format, {INSTEAD} any"
            )
        expect_array(f"{name}.values", weight.values, letters[field], VALUES_DTYPE)
        check_block_scaled_fp8(name, weight)
        if weight.block != BLOCK:
            raise NotImplementedError(
                f"{name} has blocks of {weight.block}; decode_layer takes {BLOCK}, {INSTEAD} any"
            )
    return True


def check_config(config: LayerConfig, quantised: bool = False) -> None:
    """Raises a TypeError or a ValueError that names the field, if a config cannot be.

    Args:
      config: of a layer.
      quantised: whether its experts' weights are FP8.
    """
    if not isinstance(config, LayerConfig):
        raise TypeError(f"config is {config!r}; decode_layer takes a LayerConfig")
    for field in ("qkv_spread_ns", "o_spread_ns"):
        value = getattr(config, field)
        is_number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= MAX_SPREAD_NS:
            raise ValueError(f"config.{field} is {value!r}; expected 0 to {MAX_SPREAD_NS}")
    block_ks = FP8_BLOCK_KS if quantised else BLOCK_KS
    for field, accepted in (
        ("gate_up_neurons", NEURONS["fp8" if quantised else "bf16"]),
        ("gate_up_block_k", block_ks),
        ("down_block_m", DOWN_BLOCK_MS["fp8" if quantised else "bf16"]),
        ("down_block_k", block_ks),
        ("steps_at_once", (1, 2) if quantised else (1,)),
    ):
        value = getattr(config, field)
        if value not in accepted:
            raise ValueError(f"config.{field} is {value!r}; expected one of {list(accepted)}")
    N = WholeBatchTiles.N
    of_stage = {
        "gate_up_num_stages": stage_bytes(
            config.gate_up_block_k, product_rows(config.gate_up_neurons) + N
        ),
        "down_num_stages": stage_bytes(config.down_block_k, config.down_block_m + 2 * N),
    }
    reserved = OPERAND_BYTES if quantised else 0  # the converted tokens, which all stages share
    for field, size in (fp8_stage_bytes(config) if quantised else of_stage).items():
        check_num_stages(field, getattr(config, field), size, least=2, reserved=reserved)
