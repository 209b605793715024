"""Each wrong input raises the documented error, which names field, value and what is accepted."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.block_scaled_fp8 import BlockScaledFp8, scales_shape
from pallas_kernels.decode_step import decode_layer, decode_layers
from pallas_kernels.decode_step.layer import LayerConfig
from tests.pallas_kernels.decode_step.cases import EPS, layer_shapes, struct_case

SHAPES = layer_shapes(2, kv=2)
INSTEAD = "reference_decode_layer"


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def scaled(*shape, block=(128, 128)):
    values = struct(*shape, dtype=jnp.float8_e4m3fn)
    scales = struct(*scales_shape(shape, block), dtype=jnp.float32)
    return BlockScaledFp8(values=values, scales=scales, block=block)


SCALED = struct_case(SHAPES).weights._replace(
    q_proj=scaled(512, 128), k_proj=scaled(256, 128), v_proj=scaled(256, 128),
    o_proj=scaled(128, 512), gate_up=scaled(16, 2, 128, 128), down=scaled(16, 128, 128),
)  # fmt: skip


def with_weights(**changes):
    return {"weights": struct_case(SHAPES).weights._replace(**changes)}


def with_positions(**changes):
    return {"positions": struct_case(SHAPES).positions._replace(**changes)}


def with_residual(**changes):
    return {"residual": struct_case(SHAPES).residual._replace(**changes)}


def with_config(**changes):
    return {"config": LayerConfig(**changes)}


def with_shapes(B=2, **changes):
    return struct_case(layer_shapes(B, **changes))._asdict()


# What is changed, the error, and what its message must say.
CASES = {
    "launches": ({"launches": "grid"}, ValueError, "launches is 'grid'", "['layer', 'blocks']"),
    "interpret": ({"interpret": "yes"}, TypeError, "interpret is 'yes'", "InterpretGPUParams"),
    "K zero": ({"K": 0}, ValueError, "K is 0", "1 to 16"),
    "K beyond E": ({"K": 17}, ValueError, "K is 17", "1 to 16"),
    "K beyond 32": (with_shapes(E=64) | {"K": 33}, ValueError, "K is 33", "1 to 32"),
    "K of a float": ({"K": 2.5}, ValueError, "K is 2.5", "1 to 16"),
    "K of a bool": ({"K": True}, ValueError, "K is True", "1 to 16"),
    "eps": ({"eps": -1.0}, ValueError, "eps is -1.0", "not negative"),
    "eps of text": ({"eps": "small"}, ValueError, "eps is 'small'", "a number"),
    "weights float32": (
        with_weights(q_proj=struct(512, 128, dtype=jnp.float32)),
        NotImplementedError, "weights.q_proj", "float32", "bfloat16", INSTEAD,
    ),
    "weights of integers": (
        with_weights(down=struct(16, 128, 64, dtype=jnp.int32)),
        TypeError, "weights.down", "int32", "bfloat16",
    ),
    "weights a list": (with_weights(gate=[[1.0]]), TypeError, "weights.gate", "list", "[E, H]"),
    "gate 3-D": (
        with_weights(gate=struct(1, 16, 128)), ValueError, "weights.gate", "(1, 16, 128)", "[E, H]",
    ),
    "gate's E": (
        with_weights(gate=struct(8, 128)), ValueError, "weights.gate", "(8, 128)", "(16, 128)",
    ),
    "k_proj's rows": (
        with_weights(k_proj=struct(128, 128)),
        ValueError, "weights.k_proj", "(128, 128)", "(256, 128)",
    ),
    "q_proj of no whole head": (
        with_weights(q_proj=struct(100, 128)), ValueError, "weights.q_proj", "(100, 128)", "128",
    ),
    "o_proj": (
        with_weights(o_proj=struct(512, 128)),
        ValueError, "weights.o_proj", "(512, 128)", "(128, 512)",
    ),
    "x float32": (
        with_residual(x=struct(8, 128, dtype=jnp.float32)),
        NotImplementedError, "residual.x", "float32", "bfloat16", INSTEAD,
    ),
    "x's rows": (
        with_residual(x=struct(16, 128)), ValueError, "residual.x has 16 rows", "B = 2", "of 8",
    ),
    "x not padded": (
        with_residual(x=struct(2, 128)), ValueError, "residual.x has 2 rows", "multiple of 8",
    ),
    "parts' shape": (
        with_residual(parts=struct(2, 2, 128, dtype=jnp.float32)),
        ValueError, "residual.parts", "(2, 2, 128)", "[number, 8, 128]",
    ),
    "no parts": (
        with_residual(parts=struct(0, 8, 128, dtype=jnp.float32)),
        ValueError, "residual.parts", "(0, 8, 128)", "at least 1",
    ),
    "parts' dtype": (
        with_residual(parts=struct(2, 8, 128)),
        TypeError, "residual.parts", "bfloat16", "float32",
    ),
    "keys float32": (
        {"keys": struct(2, 2, 128, 128, dtype=jnp.float32)},
        NotImplementedError, "keys", "float32", "bfloat16",
    ),
    "keys 3-D": ({"keys": struct(2, 128, 128)}, ValueError, "keys", "[B, kv, C, D]"),
    "values": (
        {"values": struct(2, 2, 64, 128)}, ValueError, "values", "(2, 2, 64, 128)", "128, 128)",
    ),
    "cos's shape": (
        with_positions(cos=struct(2, 64, dtype=jnp.float32)),
        ValueError, "positions.cos", "(2, 64)", "(2, 128)",
    ),
    "sin's dtype": (
        with_positions(sin=struct(2, 128)), TypeError, "positions.sin", "bfloat16", "float32",
    ),
    "lengths' dtype": (
        with_positions(lengths=struct(2, dtype=jnp.int16)),
        TypeError, "positions.lengths", "int16", "int32",
    ),
    "lengths a list": (
        with_positions(lengths=[1, 2]), TypeError, "positions.lengths", "list", "int32",
    ),
    "valid's dtype": (
        with_positions(valid=struct(2, dtype=jnp.bool_)),
        TypeError, "positions.valid", "bool", "int32",
    ),
    "config": ({"config": {}}, TypeError, "config is {}", "LayerConfig"),
    "spread": (with_config(o_spread_ns=-1), ValueError, "o_spread_ns is -1", "0 to 1000000"),
    "neurons": (with_config(gate_up_neurons=8), ValueError, "gate_up_neurons is 8", "[16, 32, 64]"),
    "block_k": (with_config(gate_up_block_k=96), ValueError, "gate_up_block_k is 96", "[64, 128"),
    "block_m": (with_config(down_block_m=32), ValueError, "down_block_m is 32", "[64, 128, 256]"),
    "steps": (with_config(steps_at_once=2), ValueError, "steps_at_once is 2", "one of [1]"),
    "one stage": (with_config(down_num_stages=1), ValueError, "down_num_stages is 1", "from 2 to"),
    "stages": (
        with_config(gate_up_num_stages=7, gate_up_block_k=256),
        ValueError, "gate_up_num_stages is 7", "to 6",
    ),
    "FP8 stages": (
        {"weights": SCALED} | with_config(gate_up_num_stages=24),
        ValueError, "gate_up_num_stages is 24", "to 23", "of 195584 bytes",
    ),
    "FP8 in k alone": (
        with_weights(k_proj=SCALED.k_proj), NotImplementedError,
        "weights.q_proj is bfloat16", "weights.k_proj BlockScaledFp8", "one format", INSTEAD,
    ),
    "FP8 in down alone": (
        with_weights(down=SCALED.down), NotImplementedError,
        "weights.gate_up is bfloat16", "weights.down BlockScaledFp8", INSTEAD,
    ),
    "FP8 in the router": (
        with_weights(gate=SCALED.o_proj), NotImplementedError, "weights.gate", "bfloat16", INSTEAD,
    ),
    "FP8 in other blocks": (
        with_weights(o_proj=scaled(128, 512, block=(64, 64))), NotImplementedError,
        "weights.o_proj has blocks of (64, 64)", "(128, 128)", INSTEAD,
    ),
    "FP8 scales": (
        with_weights(o_proj=dataclasses.replace(SCALED.o_proj, scales=SCALED.down.scales)),
        ValueError, "weights.o_proj.scales has shape (16, 1, 1)", "(1, 4)",
    ),
    "FP8 values": (
        with_weights(o_proj=dataclasses.replace(SCALED.o_proj, values=struct(128, 512))),
        TypeError, "weights.o_proj.values", "bfloat16", "float8_e4m3fn",
    ),
    "FP8 and I": (
        with_weights(gate_up=scaled(16, 2, 64, 128), down=scaled(16, 128, 64)),
        NotImplementedError, "I is 64", "128 with FP8 weights", INSTEAD,
    ),
    "FP8 and H": (
        with_shapes(H=192)
        | {"weights": struct_case(layer_shapes(2, H=192)).weights._replace(
            o_proj=scaled(192, 512))},
        NotImplementedError, "H is 192", "128 with FP8 weights", INSTEAD,
    ),
    "FP8 and neurons": (
        {"weights": SCALED} | with_config(gate_up_neurons=16),
        ValueError, "gate_up_neurons is 16", "[32, 64]",
    ),
    "FP8 and block_k": (
        {"weights": SCALED} | with_config(down_block_k=64),
        ValueError, "down_block_k is 64", "[128, 256]",
    ),
    "B": (with_shapes(65), NotImplementedError, "B is 65", "1 to 64", INSTEAD),
    "D": (with_shapes(D=64), NotImplementedError, "D is 64", "128", INSTEAD),
    "C": (with_shapes(C=100), NotImplementedError, "C is 100", "a multiple of 64", INSTEAD),
    "H": (with_shapes(H=96), NotImplementedError, "H is 96", "a multiple of 64", INSTEAD),
    "I": (with_shapes(I=32), NotImplementedError, "I is 32", "a multiple of 64", INSTEAD),
    "E": (with_shapes(E=12), NotImplementedError, "E is 12", "a multiple of 8 up to 512", INSTEAD),
    "E large": (with_shapes(E=520), NotImplementedError, "E is 520", "up to 512", INSTEAD),
    "heads": (with_shapes(heads=3, kv=2), NotImplementedError, "heads is 3", "kv = 2", INSTEAD),
    "many heads": (with_shapes(heads=65), NotImplementedError, "heads is 65", "64 times", INSTEAD),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_error(name):
    changes, error, *says = CASES[name]
    given = struct_case(SHAPES)._asdict() | {"K": 2, "eps": EPS} | changes
    with pytest.raises(error) as raised:
        decode_layer(**given)
    for words in says:
        assert words in str(raised.value)


# The second layer's changes, and what the error must say.
UNLIKE = {
    "I": ({"I": 128}, "I of layer 1 is 128", "64 as of layer 0"),
    "C": ({"C": 64}, "C of layer 1 is 64", "128 as of layer 0"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_layers_must_be_alike(name):
    changes, *says = UNLIKE[name]
    first, second = struct_case(layer_shapes(2)), struct_case(layer_shapes(2, **changes))
    caches = [(case.keys, case.values) for case in (first, second)]
    with pytest.raises(ValueError) as raised:
        decode_layers(
            first.residual, [first.weights, second.weights], caches, first.positions, K=2, eps=EPS
        )
    for words in says:
        assert words in str(raised.value)


@pytest.mark.parametrize("count", [0, 1])
def test_each_layer_has_a_cache(count):
    case = struct_case(layer_shapes(2))
    with pytest.raises(ValueError, match=f"of {count} and 2 layers"):
        decode_layers(
            case.residual,
            [case.weights] * count,
            [(case.keys, case.values)] * 2,
            case.positions,
            K=2,
            eps=EPS,
        )
