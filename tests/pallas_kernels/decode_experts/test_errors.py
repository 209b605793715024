"""Each wrong input raises the documented error, which names field, value and what is accepted."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_scaled_fp8 import VALUES_DTYPE, BlockScaledFp8, scales_shape
from pallas_kernels.decode_experts import (
    LAYOUTS,
    ExpertMajorConfig,
    ExpertWeights,
    OutputMajorConfig,
    decode_experts,
)
from tests.pallas_kernels.decode_experts.cases import Case, Size, make_case

SIZE = Size(T=2, E=3, K=2, H=64, I=128)


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(SIZE, 0)


def zeros(*shape, dtype=jnp.bfloat16):
    return jnp.zeros(shape, dtype)


def in_fp8(weight):
    scales = jnp.ones(scales_shape(weight.shape))
    return BlockScaledFp8(values=weight.astype(VALUES_DTYPE), scales=scales)


def weights(case, **changes):
    return case._replace(weights=dataclasses.replace(case.weights, **changes))


def sized(**changes):
    T, E, K, H, I = SIZE._replace(**changes)
    return Case(
        x=zeros(T, H),
        weights=ExpertWeights(gate_up=zeros(E, 2, I, H), down=zeros(E, H, I)),
        expert_ids=zeros(T, K, dtype=jnp.int32),
        expert_weights=zeros(T, K, dtype=jnp.float32),
    )


# What is changed, the error, and what its message must say.
INPUTS = {
    # ranks
    "x 1-D": (lambda c: c._replace(x=c.x[0]), ValueError, "x", "(64,)", "[T, H]"),
    "x 3-D": (lambda c: c._replace(x=c.x[None]), ValueError, "x", "(1, 2, 64)", "[T, H]"),
    "gate_up 3-D": (
        lambda c: weights(c, gate_up=zeros(3, 256, 64)),
        ValueError,
        "weights.gate_up",
        "(3, 256, 64)",
        "[E, 2, I, H]",
    ),
    "down 2-D": (
        lambda c: weights(c, down=zeros(192, 128)),
        ValueError,
        "weights.down",
        "(192, 128)",
        "[E, H, I]",
    ),
    "ids 1-D": (
        lambda c: c._replace(expert_ids=c.expert_ids[0]),
        ValueError,
        "expert_ids",
        "(2,)",
        "[T, K]",
    ),
    "expert_weights 1-D": (
        lambda c: c._replace(expert_weights=c.expert_weights[0]),
        ValueError,
        "expert_weights",
        "(2,)",
        "[T, K]",
    ),
    # sizes that do not fit one another
    "no tokens": (lambda c: sized(T=0), ValueError, "x", "(0, 64)", "at least 1"),
    "no experts": (lambda c: sized(E=0), ValueError, "weights.gate_up", "(0, 2,", "at least 1"),
    "K = 0": (lambda c: sized(K=0), ValueError, "expert_ids", "(2, 0)", "at least 1"),
    "three matrices": (
        lambda c: weights(c, gate_up=zeros(3, 3, 128, 64)),
        ValueError,
        "weights.gate_up",
        "(3, 3, 128, 64)",
        "[E, 2, I, H]",
    ),
    "H of gate_up": (
        lambda c: weights(c, gate_up=zeros(3, 2, 128, 128)),
        ValueError,
        "weights.gate_up",
        "(3, 2, 128, 128)",
        "(3, 2, 128, 64)",
    ),
    "H of down": (
        lambda c: weights(c, down=zeros(3, 128, 128)),
        ValueError,
        "weights.down",
        "(3, 128, 128)",
        "(3, 64, 128)",
    ),
    "I of down": (
        lambda c: weights(c, down=zeros(3, 64, 64)),
        ValueError,
        "weights.down",
        "(3, 64, 64)",
        "(3, 64, 128)",
    ),
    "E of down": (
        lambda c: weights(c, down=zeros(4, 64, 128)),
        ValueError,
        "weights.down",
        "(4, 64, 128)",
        "(3, 64, 128)",
    ),
    "T of ids": (
        lambda c: c._replace(expert_ids=zeros(3, 2, dtype=jnp.int32)),
        ValueError,
        "expert_ids",
        "(3, 2)",
        "(2, 2)",
    ),
    "K of expert_weights": (
        lambda c: c._replace(expert_weights=zeros(2, 3, dtype=jnp.float32)),
        ValueError,
        "expert_weights",
        "(2, 3)",
        "(2, 2)",
    ),
    "K > E": (lambda c: sized(K=4), ValueError, "expert_ids", "K = 4", "E = 3"),
    "H = 96": (lambda c: sized(H=96), ValueError, "H is 96", "multiple of 64"),
    "H = 32": (lambda c: sized(H=32), ValueError, "H is 32", "multiple of 64"),
    "I = 100": (lambda c: sized(I=100), ValueError, "I is 100", "multiple of 64"),
    # dtypes
    "x int8": (
        lambda c: c._replace(x=zeros(2, 64, dtype=jnp.int8)),
        TypeError,
        "x",
        "int8",
        "bfloat16",
    ),
    "down uint8": (
        lambda c: weights(c, down=zeros(3, 64, 128, dtype=jnp.uint8)),
        TypeError,
        "weights.down",
        "uint8",
        "bfloat16",
    ),
    "gate_up float8": (
        lambda c: weights(c, gate_up=zeros(3, 2, 128, 64, dtype=jnp.float8_e4m3fn)),
        NotImplementedError,
        "weights.gate_up",
        "float8_e4m3fn",
        "bfloat16",
        "reference_experts",
    ),
    "ids float32": (
        lambda c: c._replace(expert_ids=c.expert_ids.astype(jnp.float32)),
        TypeError,
        "expert_ids",
        "float32",
        "int32",
    ),
    "ids uint32": (
        lambda c: c._replace(expert_ids=c.expert_ids.astype(jnp.uint32)),
        TypeError,
        "expert_ids",
        "uint32",
        "int32",
    ),
    "expert_weights bfloat16": (
        lambda c: c._replace(expert_weights=c.expert_weights.astype(jnp.bfloat16)),
        TypeError,
        "expert_weights",
        "bfloat16",
        "float32",
    ),
    # what a later kernel may take
    "x float32": (
        lambda c: c._replace(x=c.x.astype(jnp.float32)),
        NotImplementedError,
        "x",
        "float32",
        "bfloat16",
        "reference_experts",
    ),
    "gate_up float16": (
        lambda c: weights(c, gate_up=c.weights.gate_up.astype(jnp.float16)),
        NotImplementedError,
        "weights.gate_up",
        "float16",
        "bfloat16",
        "reference_experts",
    ),
    "down float32": (
        lambda c: weights(c, down=c.weights.down.astype(jnp.float32)),
        NotImplementedError,
        "weights.down",
        "float32",
        "bfloat16",
        "reference_experts",
    ),
    "gate_up alone in FP8": (
        lambda c: weights(c, gate_up=in_fp8(c.weights.gate_up)),
        TypeError,
        "weights.down",
        "bfloat16",
        "BlockScaledFp8",
    ),
    "down alone in FP8": (
        lambda c: weights(c, down=in_fp8(c.weights.down)),
        TypeError,
        "weights.gate_up",
        "bfloat16",
        "BlockScaledFp8",
    ),
}

KEYWORDS = {
    "layout unknown": ({"layout": "row_major"}, ValueError, "layout", "'row_major'", "auto"),
    "layout None": ({"layout": None}, ValueError, "layout", "None", "auto"),
    "out_dtype float16": (
        {"out_dtype": jnp.float16},
        TypeError,
        "out_dtype",
        "float16",
        "bfloat16 or float32",
    ),
    "out_dtype int32": (
        {"out_dtype": jnp.int32},
        TypeError,
        "out_dtype",
        "int32",
        "bfloat16 or float32",
    ),
    "config of another layout": (
        {"layout": "output_major", "config": ExpertMajorConfig()},
        TypeError,
        "config",
        "output_major",
        OutputMajorConfig.__name__,
    ),
    "config a dict": (
        {"layout": "expert_major", "config": {"down_num_stages": 3}},
        TypeError,
        "config",
        "{'down_num_stages': 3}",
        "expert_major",
        ExpertMajorConfig.__name__,
    ),
}


def assert_raises(error, fragments, case, **keywords):
    with pytest.raises(error) as raised:
        decode_experts(*case, **{"layout": "output_major", "interpret": True} | keywords)
    assert type(raised.value) is error
    for fragment in fragments:
        assert fragment in str(raised.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", INPUTS)
def test_input(case, name, layout):
    change, error, *fragments = INPUTS[name]
    assert_raises(error, fragments, change(case), layout=layout)


@pytest.mark.parametrize("name", INPUTS)
def test_input_under_jit(case, name):
    change, error, *fragments = INPUTS[name]
    with pytest.raises(error, match=re.escape(fragments[0])):
        jax.jit(lambda case: decode_experts(*case, interpret=True))(change(case))


@pytest.mark.parametrize("name", KEYWORDS)
def test_keyword(case, name):
    keywords, error, *fragments = KEYWORDS[name]
    assert_raises(error, fragments, case, **keywords)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0, -64, 3, 2**20])
def test_config_value(case, layout, value):
    checked = LAYOUTS[layout]
    for field in (field.name for field in dataclasses.fields(checked.Config)):
        config = dataclasses.replace(checked.default_config(SIZE.shapes, SIZE.T), **{field: value})
        if field.endswith("stages") and value == 3:
            checked.check(config, SIZE.shapes)  # a fine number of stages
            continue
        fragments = (f"config.{field}", str(value), "expected")
        assert_raises(ValueError, fragments, case, layout=layout, config=config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_true_is_no_number_of_stages(case, layout):
    default = LAYOUTS[layout].default_config(SIZE.shapes, SIZE.T)
    for field in vars(default):
        if field.endswith("stages"):
            config = dataclasses.replace(default, **{field: True})
            fragments = (f"config.{field} is True", "expected an integer from")
            assert_raises(ValueError, fragments, case, layout=layout, config=config)


@pytest.mark.parametrize(
    ("layout", "field", "letter"),
    [
        ("output_major", "gate_up_block_k", "H = 192"),
        ("output_major", "down_block_k", "I = 64"),
        ("expert_major", "gate_up_block_k", "H = 192"),
        ("expert_major", "down_block_k", "I = 64"),
    ],
)
def test_config_that_does_not_divide_this_layer(layout, field, letter):
    # 128 divides H = 192 no more than I = 64; the columns of a stage must.
    case = make_case(Size(T=1, E=1, K=1, H=192, I=64), 0)
    default = LAYOUTS[layout].default_config(Size(1, 1, 1, 192, 64).shapes, 1)
    config = dataclasses.replace(default, **{field: 128})
    fragments = (f"config.{field}", "128", letter)
    assert_raises(ValueError, fragments, case, layout=layout, config=config)


@pytest.mark.parametrize(
    ("name", "value"),
    [("x", [[1.0]]), ("expert_ids", [[0]]), ("expert_weights", (0.5,)), ("weights", {})],
)
def test_argument_that_is_no_array(case, name, value):
    changed = case._replace(**{name: value})
    assert_raises(TypeError, (name, type(value).__name__, "expected"), changed, layout="auto")


def test_numpy_ids_of_64_bits_are_not_wrapped(case):
    changed = case._replace(expert_ids=np.full(case.expert_ids.shape, 2**32, np.int64))
    assert_raises(TypeError, ("expert_ids", "int64", "int32"), changed, layout="auto")


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("interpret", "yes"), ("out_dtype", "foo")],
)
def test_keyword_of_wrong_type(case, keyword, value):
    fragments = (keyword, "expected")
    assert_raises(TypeError, fragments, case, layout="expert_major", **{keyword: value})
