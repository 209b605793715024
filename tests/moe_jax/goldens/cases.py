"""The parity cases: a table of plain data that the maker of goldens and the tests both read.

A case is a config.json (BASE with a few keys replaced), the inputs of one forward pass, and what is
recorded of it. Standard library only, Python 3.11 and later: the maker runs in an environment of
its own, where this package is not installed.
"""

import copy
import dataclasses

ABSENT = "(absent)"  # as a value in `config`: the key is left out of the file

# config.json as a hub file of transformers 4 spells it. heads * head_dim is not hidden_size, and
# theta, epsilon and the coefficient are no implementation's defaults.
BASE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 28,
    "max_position_embeddings": 64,
    "max_window_layers": 3,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 100.0,
    "router_aux_loss_coef": 0.05,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 61,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One config, one forward pass, and what to record.

    Attributes:
      config: keys of config.json that replace BASE's; ABSENT leaves one out.
      length: S; B is 2.
      padding: "left" or "right" pads row 1, "both" row 0 on the right and row 1 on the left, "gap"
        has padding between the valid tokens of row 1: a right-padded prompt that went on.
      positions: "offset" (each row starts elsewhere), "jumps" (positions are skipped) or "packed"
        (positions restart: a row holds several sequences).
      embeds: the model gets inputs_embeds instead of input_ids.
      labels: also record the loss.
      router_logits: output_router_logits of the call; None leaves it to the config.
      keep: logits_to_keep.
      gradients: also record the loss's gradients to routers and experts.
      chunks: lengths of pieces; for each entry, passes over the pieces with a cache between them
        give the same logits as one pass over all.
      cached_differs: they do not, in transformers: also record theirs for each entry.
      new_tokens: also record this many greedily generated tokens and their logits.
      against: config keys with which the oracle's logits must come out otherwise, or the case would
        not show that the model heeds its config.
      same_as: config keys with which the oracle's logits must be the same.
      fp8: the blocks that linears are quantised in, and their scales' dtype.
    """

    name: str
    config: dict = dataclasses.field(default_factory=dict)
    length: int = 11
    padding: str = ""
    positions: str = ""
    embeds: bool = False
    labels: bool = True
    router_logits: bool | None = True
    keep: int | tuple = 0
    gradients: bool = False
    chunks: tuple = ()
    cached_differs: bool = False
    new_tokens: int = 0
    against: dict | None = None
    same_as: dict | None = None
    fp8: tuple | None = None

    @property
    def config_json(self) -> dict:
        """The case's whole config.json."""
        return replace_keys(BASE, self.config)


def replace_keys(config: dict, replaced: dict) -> dict:
    """The config with some keys replaced, and without those that are ABSENT; a deep copy, as
    transformers writes into the dicts that it is given.
    """
    merged = {key: value for key, value in (config | replaced).items() if value != ABSENT}
    return copy.deepcopy(merged)


# 1 token, 3 + 1 tokens, chunks
CHUNKS = ((1,) * 11, (3, 1, 3, 1, 3), (5, 3, 3))
WINDOW = {"use_sliding_window": True, "sliding_window": 4}
DENSE = {"mlp_only_layers": [0, 1, 2]}

CONFIG_CASES = [
    Case(name="base"),
    Case(name="vocab_size", config={"vocab_size": 37}),
    Case(name="hidden_size", config={"hidden_size": 20}),
    Case(name="intermediate_size", config={"intermediate_size": 18, "mlp_only_layers": [0]}),
    Case(name="num_hidden_layers", config={"num_hidden_layers": 1}),
    Case(name="num_attention_heads", config={"num_attention_heads": 2}),
    Case(name="num_key_value_heads_1", config={"num_key_value_heads": 1}),
    Case(name="num_key_value_heads_all", config={"num_key_value_heads": 4}),
    Case(name="hidden_act", config={"hidden_act": "gelu"}, against={"hidden_act": "silu"}),
    Case(name="initializer_range", config={"initializer_range": 0.5}, same_as={}),
    Case(name="rms_norm_eps", config={"rms_norm_eps": 0.1}, against={"rms_norm_eps": 1e-6}),
    Case(
        name="max_position_embeddings",
        config={
            "max_position_embeddings": 8,
            "rope_scaling": {"type": "dynamic", "factor": 4.0},
        },
        against={"max_position_embeddings": 64},
    ),
    Case(name="head_dim_absent", config={"head_dim": ABSENT}),
    Case(name="rope_theta", config={"rope_theta": 5.0}, against={"rope_theta": 100.0}),
    Case(
        name="rope_theta_absent",
        config={"rope_theta": ABSENT},
        same_as={"rope_theta": 10000.0},
        against={"rope_theta": 1e6},
    ),
    Case(
        name="rope_parameters",
        config={
            "rope_theta": ABSENT,
            "rope_scaling": ABSENT,
            "rope_parameters": {"rope_theta": 5.0, "rope_type": "default"},
        },
        against={"rope_parameters": ABSENT},
    ),
    Case(name="attention_bias", config={"attention_bias": True}),
    Case(name="sliding_window", config=WINDOW, against={"sliding_window": 5}),
    Case(
        name="use_sliding_window_false",
        config={"use_sliding_window": False, "sliding_window": 4},
        same_as={"sliding_window": None},
        against={"use_sliding_window": True},
    ),
    Case(
        name="max_window_layers",
        config=WINDOW | {"max_window_layers": 1},
        same_as={"max_window_layers": ABSENT},
        against={"use_sliding_window": False},
    ),
    Case(name="decoder_sparse_step", config={"decoder_sparse_step": 2}),
    Case(name="mlp_only_layers", config={"mlp_only_layers": [1]}),
    Case(
        name="mlp_only_layers_and_sparse_step",
        config={"mlp_only_layers": [3], "decoder_sparse_step": 2, "num_hidden_layers": 4},
    ),
    Case(name="num_experts", config={"num_experts": 8}),
    # transformers itself cannot give the router logits of a model without experts
    Case(name="num_experts_0", config={"num_experts": 0}, router_logits=None),
    Case(name="dense_only", config=DENSE, router_logits=None),
    Case(
        name="num_local_experts",
        config={"num_experts": ABSENT, "num_local_experts": 6},
        same_as={"num_local_experts": ABSENT, "num_experts": 6},
    ),
    Case(
        name="num_experts_per_tok_1",
        config={"num_experts_per_tok": 1},
        against={"num_experts_per_tok": 2},
    ),
    Case(
        name="num_experts_per_tok_1_unnormalised",
        config={"num_experts_per_tok": 1, "norm_topk_prob": False},
        against={"norm_topk_prob": True},
    ),
    Case(
        name="num_experts_per_tok_all",
        config={"num_experts_per_tok": 6},
        against={"num_experts_per_tok": 2},
    ),
    Case(name="moe_intermediate_size", config={"moe_intermediate_size": 10}),
    Case(
        name="norm_topk_prob_false",
        config={"norm_topk_prob": False},
        against={"norm_topk_prob": True},
    ),
    Case(
        name="norm_topk_prob_absent",
        config={"norm_topk_prob": ABSENT},
        same_as={"norm_topk_prob": False},
    ),
    Case(name="output_router_logits", config={"output_router_logits": True}, router_logits=None),
    Case(name="output_router_logits_false", router_logits=None),
    Case(name="router_aux_loss_coef", config={"router_aux_loss_coef": 0.7}),
    Case(name="router_aux_loss_coef_absent", config={"router_aux_loss_coef": ABSENT}),
    Case(name="tie_word_embeddings", config={"tie_word_embeddings": True}),
    Case(
        name="unknown_keys",
        config={"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0},
        same_as={"qkv_bias": ABSENT},
    ),
]

# What is trained on is 15 tokens: 11 lie inside, 19 beyond. theta is small, so that all of D/2 = 8
# wavelengths (6 to 47 tokens) matter at these lengths.
ORIGINAL = 15
ROPE_THETA = 10.0
_LENGTHS = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
ROPE_SETTINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": _LENGTHS,
    "longrope": _LENGTHS
    | {
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
    },
    # one wavelength is kept, three are blended, four are divided
    "llama3": _LENGTHS | {"low_freq_factor": 1.0, "high_freq_factor": 2.0},
}


def rope_v4(kind: str, settings: dict) -> dict:
    """The keys of a RoPE kind as transformers 4 spells them; the inner key is the old `type`."""
    scaling = None if kind == "default" else {"type": kind, **settings}
    # A dynamic model is trained on its max_position_embeddings; it knows no other length.
    length = ORIGINAL if kind in ("default", "dynamic") else 4 * ORIGINAL
    return {
        "rope_theta": ROPE_THETA,
        "rope_scaling": scaling,
        "max_position_embeddings": length,
    }


def rope_v5(kind: str, settings: dict) -> dict:
    """The same as transformers 5 spells them."""
    return rope_v4(kind, settings) | {
        "rope_theta": ABSENT,
        "rope_scaling": ABSENT,
        "rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": kind, **settings},
    }


def _rope_cases():
    for kind, settings in ROPE_SETTINGS.items():
        default = rope_v4("default", {}) | {"rope_parameters": ABSENT}
        depends_on_length = kind in ("dynamic", "longrope")
        inside = {"against": default}
        if kind in ("default", "dynamic"):
            inside = {"same_as": default}
        yield Case(
            name=f"rope_{kind}_inside",
            config=rope_v4(kind, settings),
            chunks=CHUNKS[1:2],
            **inside,
        )
        yield Case(
            name=f"rope_{kind}_beyond",
            config=rope_v5(kind, settings),
            length=19,
            # the second piece crosses the original length
            chunks=((11, 5, 1, 1, 1),) + ((1,) * 19,) * depends_on_length,
            cached_differs=depends_on_length,
            against=None if kind == "default" else default,
        )
    for name, kind, changed in (
        ("yarn_attention_factor", "yarn", {"attention_factor": 1.5}),
        ("yarn_betas", "yarn", {"beta_fast": 2.5, "beta_slow": 0.5}),
        ("yarn_mscale", "yarn", {"mscale": 0.7, "mscale_all_dim": 0.3}),
        ("yarn_not_truncated", "yarn", {"truncate": False}),
        ("yarn_original_absent", "yarn", {"original_max_position_embeddings": ABSENT}),
        ("longrope_attention_factor", "longrope", {"attention_factor": 1.5}),
        ("longrope_factor_8", "longrope", {"factor": 8.0}),
    ):
        settings = ROPE_SETTINGS[kind]
        yield Case(
            name=f"rope_{name}",
            config=rope_v4(kind, replace_keys(settings, changed)),
            against=rope_v4(kind, settings),
        )
    # The factor is then max_position_embeddings / the original length, which is 4 here too.
    no_factor = replace_keys(ROPE_SETTINGS["longrope"], {"factor": ABSENT})
    yield Case(
        name="rope_longrope_factor_absent",
        config=rope_v4("longrope", no_factor),
        same_as=rope_v4("longrope", ROPE_SETTINGS["longrope"]),
        against={"max_position_embeddings": 48},
    )
    # The longest row decides for the whole batch, by its positions.
    shorter = ROPE_SETTINGS["longrope"] | {"original_max_position_embeddings": ORIGINAL - 1}
    fifteen_is_inside = {
        "dynamic": {"same_as": rope_v4("default", {})},
        "longrope": {"against": rope_v4("longrope", shorter)},
    }
    for kind in ("dynamic", "longrope"):
        yield Case(
            name=f"rope_{kind}_ragged",
            config=rope_v4(kind, ROPE_SETTINGS[kind]),
            length=19,
            padding="left",
            chunks=((11, 5, 1, 1, 1),),
            cached_differs=True,
        )
        # Padding is not part of a row's length: 19 columns, of which 15 are valid in either row.
        yield Case(
            name=f"rope_{kind}_padding_is_no_length",
            config=rope_v4(kind, ROPE_SETTINGS[kind]),
            length=19,
            padding="both",
            **fifteen_is_inside[kind],
        )


ROPE_CASES = list(_rope_cases())

CALL_CASES = [
    Case(name="padding_left", padding="left", chunks=CHUNKS),
    Case(name="padding_right", padding="right"),
    Case(name="padding_both", padding="both"),
    Case(name="padding_gap", padding="gap", chunks=CHUNKS),
    Case(name="padding_left_window", padding="left", config=WINDOW, chunks=CHUNKS),
    Case(name="padding_right_window", padding="right", config=WINDOW),
    # only kinds whose frequencies depend on the length can tell where a row starts
    Case(
        name="position_ids_offset",
        config=rope_v4("dynamic", ROPE_SETTINGS["dynamic"]),
        positions="offset",
        against={"rope_scaling": None},
    ),
    Case(name="position_ids_jumps", positions="jumps"),
    Case(name="packed", positions="packed"),
    Case(name="packed_window", positions="packed", config=WINDOW),
    Case(name="inputs_embeds", embeds=True),
    Case(name="inputs_embeds_padding_left", embeds=True, padding="left"),
    Case(name="logits_to_keep_3", keep=3, labels=False),
    Case(name="logits_to_keep_indices", keep=(0, 7, 4), labels=False),
    Case(name="cached", chunks=CHUNKS),
    Case(name="cached_window", config=WINDOW, chunks=CHUNKS),
    Case(name="cached_dense_layer", config={"mlp_only_layers": [1]}, chunks=CHUNKS[1:2]),
    Case(name="generate", length=5, new_tokens=12, labels=False),
    Case(name="generate_ragged", length=11, padding="left", new_tokens=12, labels=False),
    Case(name="generate_window", config=WINDOW, length=3, new_tokens=12, labels=False),
    Case(
        name="generate_window_ragged",
        config=WINDOW,
        length=5,
        padding="left",
        new_tokens=12,
        labels=False,
    ),
]

GRADIENT_CASES = [
    Case(
        name=f"gradients{'_padding_left' * padded}{'_norm_topk_prob_false' * (not normalised)}",
        config={"norm_topk_prob": normalised, "num_hidden_layers": 2},
        padding="left" if padded else "",
        gradients=True,
    )
    for normalised in (True, False)
    for padded in (False, True)
]

_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
FP8_CASES = [
    # every linear is ragged against the blocks of the published models
    Case(
        name="fp8_128x128",
        config={
            "hidden_size": 144,
            "moe_intermediate_size": 136,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "torch_dtype": "bfloat16",
            "quantization_config": {**_FP8, "weight_block_size": [128, 128]},
        },
        fp8=(128, 128, "bfloat16"),
    ),
    # blocks that are not square, scales in float32, a dense layer and attention biases
    Case(
        name="fp8_8x4",
        config={
            "mlp_only_layers": [1],
            "moe_intermediate_size": 16,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "attention_bias": True,
            "quantization_config": {**_FP8, "weight_block_size": [8, 4]},
        },
        fp8=(8, 4, "float32"),
    ),
]

CASES = {
    case.name: case for case in CONFIG_CASES + ROPE_CASES + CALL_CASES + GRADIENT_CASES + FP8_CASES
}
