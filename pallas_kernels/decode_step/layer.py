"""A decoder layer's decode step as a list of tasks.

    add_1        total = x + the last layer's outputs; the norm's weight times it
    qkv          partial sums of q, k and v
    attend       RMSNorm of q and k, RoPE, the cache's new slot, attention over a split of the keys
    merge        the splits of a row and head
    o            partial sums of the output projection
    add_2        total = total + o; partial sums of the router's product
    norm         RMSNorm: the experts' input
    top_k        softmax and top-k
    gate_up      the experts' first product and its epilogue
    down         the second, one output for each assignment; the next add_1 adds them

`attention_tasks` are the first six, `router_tasks` the next two, `experts_tasks` the last two. Up
to 8 tokens all of them can be one grid. Divisions by a norm's root mean square are left to those
who read a product (add_residual.py): attend and top_k.
"""

import dataclasses

from pallas_kernels.decode_attention.merge_splits import MergeSplits
from pallas_kernels.decode_attention.split_attention import SplitAttention
from pallas_kernels.decode_experts.configs import largest_divisor
from pallas_kernels.decode_experts.expert_major_fp8 import FP8_BLOCK_KS, DownFp8, GateUpFp8
from pallas_kernels.decode_experts.expert_major_kernels import BLOCK_KS, Down, GateUp
from pallas_kernels.decode_step.add_residual import COLUMNS, AddResidual
from pallas_kernels.decode_step.attention_work import AttendWork, MergeWork
from pallas_kernels.decode_step.experts_work import DownWork, GateUpWork, slot_major_tiles
from pallas_kernels.decode_step.norm_input import NormInput
from pallas_kernels.decode_step.split_product import SplitProduct
from pallas_kernels.decode_step.split_product_fp8 import SplitProductFp8
from pallas_kernels.decode_step.tasks import Task
from pallas_kernels.decode_step.top_k import TopK
from pallas_kernels.mosaic.operands import round_up

# The products whose weights may be FP8, each by itself, and their fields of LayerWeights.
PRODUCTS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "experts": ("gate_up", "down"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShapes:
    """A layer's sizes in the house's letters, and what of its config the tasks need.

    Attributes:
      B: rows, each with one new token.
      H, heads, kv, D: of the attention.
      C: slots of a row of the cache.
      E, K, I: of the experts.
      eps: of the RMSNorms.
      norm_topk_prob: as in the config.
      fp8: which products' weights are FP8, of PRODUCTS.
    """

    B: int
    H: int
    heads: int
    kv: int
    D: int
    C: int
    E: int
    K: int
    I: int
    eps: float
    norm_topk_prob: bool
    fp8: tuple[str, ...] = ()

    @property
    def N(self) -> int:
        """Columns of a product: the tokens, and padding."""
        return round_up(self.B, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """How a layer's tasks are cut and paced; nothing here changes a bit of a result on a GPU.

    Experts in FP8 take gate_up_neurons of 32 or 64, block_k of 128 or 256, and steps_at_once.

    Attributes:
      qkv_spread_ns, o_spread_ns: see SplitProduct.
      gate_up_neurons, gate_up_block_k, gate_up_num_stages: of GateUp. Fewer neurons are more
        blocks, which share few experts' weights more evenly among cores.
        A block_k that does not divide its size is halved until it does.
      down_block_m, down_block_k, down_num_stages: of Down.
      steps_at_once: of both products, 1 or 2; see Fp8Product.
      mailboxes: whether the tasks of a grid of all of them hand on their results in mailboxes.
    """

    qkv_spread_ns: int = 4000
    o_spread_ns: int = 0
    gate_up_neurons: int = 32
    gate_up_block_k: int = 128
    gate_up_num_stages: int = 4
    down_block_m: int = 64
    down_block_k: int = 128
    down_num_stages: int = 3
    steps_at_once: int = 1
    mailboxes: bool = True


_FEW_ROWS = LayerConfig(o_spread_ns=4000)
# Half the bytes take half the time. Three blocks share a core: 74 KB each, converted tokens too.
_FP8 = LayerConfig(
    qkv_spread_ns=2000,
    gate_up_num_stages=4,
    down_block_m=128,
    down_num_stages=3,
)
_FP8_FEW_ROWS = dataclasses.replace(
    _FP8,
    o_spread_ns=2000,
    gate_up_num_stages=7,
    down_block_m=64,
    down_num_stages=6,
)
# Few blocks share a core, so the waits of a step are filled by another step.
_FP8_ONE_ROW = dataclasses.replace(_FP8_FEW_ROWS, steps_at_once=2)


def default_config(B: int, quantised: bool = False) -> LayerConfig:
    """What was fastest for B rows of Qwen3-30B-A3B on an H200 (docs/lab.md)."""
    if quantised:
        return _FP8_ONE_ROW if B == 1 else _FP8_FEW_ROWS if B == 2 else _FP8
    if B > 2:
        return LayerConfig()
    return dataclasses.replace(_FEW_ROWS, gate_up_neurons=16) if B == 1 else _FEW_ROWS


def attention_tasks(
    s: LayerShapes, config: LayerConfig, num_parts: int, mailed: bool = False
) -> list[Task]:
    """From x and what is added to it to the next residual, and the router's partial sums.

    Args:
      s: sizes.
      config: how.
      num_parts: parts of what is added to x, at least one.
      mailed: whether results are handed on in mailboxes; for at most 8 rows.
    """
    rows = (s.heads * s.D, s.kv * s.D, s.kv * s.D)
    add_1 = AddResidual(
        T=s.B, H=s.H, N=s.N, num_parts=num_parts, masked=True, mailed=mailed, keeps=not mailed
    )
    qkv = _split_product(s, "qkv")(
        T=s.B, N=s.N, rows=rows, columns=s.H, after="add_1", D=s.D, mailed=mailed,
        spread_ns=config.qkv_spread_ns,
    )  # fmt: skip
    phase = SplitAttention(
        B=s.B, heads=s.heads, kv=s.kv, D=s.D, C=s.C, num_partials=qkv.num_splits, eps=s.eps
    )
    attend = AttendWork(phase=phase, H=s.H, eps=s.eps, after="qkv")
    merge = MergeWork(phase=MergeSplits(attention=phase), N=s.N, after="attend", mailed=mailed)
    o = _split_product(s, "o")(
        T=s.B, N=s.N, rows=(s.H,), columns=s.heads * s.D, after="merge", mailed=mailed,
        spread_ns=config.o_spread_ns,
    )  # fmt: skip
    add_2 = AddResidual(
        T=s.B, H=s.H, N=s.N, num_parts=o.num_splits, E=s.E, mailed=mailed, after="o"
    )
    total = "attention_input"
    names = ("qkv", "cos", "sin", "q_norm", "k_norm", "lengths", "valid")
    tasks = [
        Task(
            kind="add_1",
            work=add_1,
            reads={
                "x": "x",
                "norm_weight": "input_layernorm",
                "parts": "parts",
                "valid": "valid",
            },
            writes={
                "scaled": "scaled",
                "squares": "squares_1",
                "words" if mailed else "total": total,
            },
        ),
        Task(
            kind="qkv",
            work=qkv,
            reads={"tokens": "scaled"} | {f"weights_{i}": f"{c}_proj" for i, c in enumerate("qkv")},
            writes={"partials": "qkv"},
            waits_for={"add_1": qkv.num_blocks},
        ),
        Task(
            kind="attend",
            work=attend,
            reads={name: name for name in names} | {"squares": "squares_1"},
            writes={role: f"attend_{role}" for role in attend.out_types},
            updates={"keys": "keys", "values": "values"},
            waits_for={"qkv": attend.num_blocks},
        ),
        Task(
            kind="merge",
            work=merge,
            reads={role: f"attend_{role}" for role in attend.out_types}
            | {"lengths": "lengths", "valid": "valid"},
            writes={"attended": "attended"},
            waits_for={"attend": merge.phase.blocks_per_pair},
        ),
        Task(
            kind="o",
            work=o,
            reads={"tokens": "attended", "weights_0": "o_proj"},
            writes={"partials": "o"},
            waits_for={"merge": o.num_blocks},
        ),
        Task(
            kind="add_2",
            work=add_2,
            reads={
                "x": total,
                "norm_weight": "post_attention_layernorm",
                "parts": "o",
                "gate": "gate",
            },
            writes={"total": "residual", "squares": "squares_2", "partials": "logits_partials"}
            | ({"words": "residual_words"} if mailed else {}),
            waits_for={"o": add_2.num_blocks},
        ),
    ]
    return [_in_mailboxes(task) for task in tasks] if mailed else tasks


def _split_product(s: LayerShapes, name: str) -> type[SplitProduct]:
    return SplitProductFp8 if name in s.fp8 else SplitProduct


def _in_mailboxes(task: Task) -> Task:
    """The same, which waits for nothing, and posts all but what the next grid reads."""
    posts = {role: name for role, name in task.writes.items() if name != "residual"}
    writes = {role: name for role, name in task.writes.items() if name == "residual"}
    return dataclasses.replace(task, posts=posts, writes=writes, waits_for={})


def router_tasks(s: LayerShapes, mailed: bool = False, sharded: bool = False) -> list[Task]:
    """From the router's partial sums to logits, ids, weights, and the experts' input.

    Arguments as those of attention_tasks; `sharded` as in TopK.
    """
    norm = NormInput(T=s.B, H=s.H, N=s.N, eps=s.eps, mailed=mailed, after="add_2")
    top_k = TopK(
        T=s.B,
        H=s.H,
        E=s.E,
        K=s.K,
        eps=s.eps,
        num_splits=s.H // COLUMNS,
        norm_topk_prob=s.norm_topk_prob,
        mailed=mailed,
        sharded=sharded,
        after="add_2",
    )
    first = {"first_expert": "first_expert"} if sharded else {}
    waits_for = {} if mailed else {"add_2": s.B}
    return [
        Task(
            kind="norm",
            work=norm,
            reads={
                "squares": "squares_2",
                "total": "residual_words" if mailed else "residual",
                "norm_weight": "post_attention_layernorm",
            },
            writes={"normed": "moe_input"},
            waits_for=waits_for,
        ),
        Task(
            kind="top_k",
            work=top_k,
            reads={"partials": "logits_partials", "squares": "squares_2", "valid": "valid"} | first,
            writes={name: name for name in ("logits", "ids", "weights")},
            posts={name: name for name in ("id_words", "weight_words") if mailed},
            waits_for=waits_for,
        ),
    ]


def experts_tasks(
    s: LayerShapes, config: LayerConfig, mailed: bool = False, stored: int | None = None
) -> list[Task]:
    """From moe_input, ids and weights to outputs; at most 8 tokens.

    Arguments as those of attention_tasks; `stored` is how many experts there are weights of, all by
    default.
    """
    ids, weights = ("id_words", "weight_words") if mailed else ("ids", "weights")
    tiles = slot_major_tiles(s.B, s.K, s.E if stored is None else stored, s.H)
    fp8 = "experts" in s.fp8
    of_fp8 = {"steps_at_once": config.steps_at_once} if fp8 else {}
    gate_up = (GateUpFp8 if fp8 else GateUp)(
        tiles=tiles,
        H=s.H,
        I=s.I,
        block_k=largest_divisor(s.H, _up_to(config.gate_up_block_k, fp8)),
        num_stages=config.gate_up_num_stages,
        neurons=config.gate_up_neurons,
        **of_fp8,
    )
    down = (DownFp8 if fp8 else Down)(
        tiles=tiles,
        H=s.H,
        I=s.I,
        block_m=config.down_block_m,
        block_k=largest_divisor(s.I, _up_to(config.down_block_k, fp8)),
        num_stages=config.down_num_stages,
        **of_fp8,
    )
    return [
        Task(
            kind="gate_up",
            work=GateUpWork(product=gate_up, after_ids="top_k", after="norm", mailed=mailed),
            reads={
                "ids": ids,
                "weights": weights,
                "tokens": "moe_input",
                "gate_up": "gate_up",
            },
            writes={"hidden": "hidden"},
            waits_for=({} if mailed else {"top_k": gate_up.num_blocks})
            | {"norm": gate_up.num_blocks},
        ),
        Task(
            kind="down",
            work=DownWork(product=down, after_ids="top_k", after="gate_up", mailed=mailed),
            reads={"ids": ids, "hidden": "hidden", "down": "down"},
            writes={"outputs": "outputs"},
            waits_for=({} if mailed else {"top_k": down.num_blocks})
            | {"gate_up": down.blocks_per_tile},
        ),
    ]


def _up_to(block_k: int, fp8: bool) -> tuple[int, ...]:
    accepted = FP8_BLOCK_KS if fp8 else BLOCK_KS
    return tuple(columns for columns in accepted if columns <= block_k)
