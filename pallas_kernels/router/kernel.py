"""The router in one launch, phases with a barrier of the whole grid between them:

    1. normalise   (if asked for) program t: token t's RMSNorm                       -> normed
       ---------- barrier ----------
    2. multiply    unit (split of H, 64 experts): partials = gate[64, split] x[:, split]
       ---------- barrier ----------
    3. choose      program t: logits = partials added in order, softmax, top-k
                                                                  -> logits, ids, weights

The gate (512 KB for E = 128, H = 2048) is cold: each program starts its copies of it before all
else, so that phase 1 and its barrier hide behind them, and many programs read it at once. That H is
split is what makes the reads of both operands small; the price is the first barrier and the
partials, which stay in L2. The splits depend on H alone, so a token's logits have the same bits in
every batch.

1. Variance in float32; bf16, then times the weight, as a model's RMSNorm does it.
2. Swap-AB on the tensor cores: 64 experts are M, the tokens are N columns. Columns do not mix.
3. An expert a lane; each lane counts the experts that come before its own, E comparisons without
   any exchange between lanes (beyond some 200 experts, K rounds of a maximum instead). A tile of 16
   ranks by E experts then turns "expert e has rank r" around by sums along rows.

Microseconds expected on an H100, E = 128, H = 2048 (a model, to be replaced by measurements):

    launch 1.3 | gate 1.2, product and partials 0.4 | barrier 0.9 | partials 0.7, rank 0.4,
    choice 0.4, writes 0.2

5.5 in all. RMSNorm adds 1.4: 1.0 and a
barrier beside the gate's 1.2, then the wait for normed. Two launches instead of a barrier would pay
a gap of 1.0 to 1.5 for each, and no prefetch. A single cluster of 8 programs with its barriers of
0.2 would save 1.5 at T = 8, but choose 8 tokens one after the other in each program at T = 64, and
lose 6. Splitting E and not H needs no partials, but every program then reads all of x: 256 KB at
T = 64, 5 or more.

Calls must follow one another, as those on one stream do: they share the barrier's counter.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.device import core_count
from pallas_kernels.router import grid_barrier
from pallas_kernels.router.choice import choice_scratch, choose
from pallas_kernels.router.product import multiply, normalise, product_scratch, start_gate
from pallas_kernels.router.work import ROWS, Refs, Work

_INTERPRETED_PROGRAMS = 3


def num_programs(units: int, T: int, interpret) -> int:
    """As many as have something to do in one of the phases, and at most one a core."""
    if interpret:
        return _INTERPRETED_PROGRAMS
    return min(core_count(), max(units, T))


def run(work: Work, x, gate, norm_weight, interpret) -> dict[str, jax.Array]:
    """All outputs by the names of Refs, from checked inputs."""
    if interpret:
        return _in_a_launch_each(work, x, gate, norm_weight, interpret)
    return _in_one_launch(work, x, gate, norm_weight)


def _output_types(work: Work) -> dict[str, jax.ShapeDtypeStruct]:
    """What each phase writes."""
    struct, T, K = jax.ShapeDtypeStruct, work.T, work.K
    types = {
        "partials": struct((work.splits, work.N, work.lanes), jnp.float32),
        "logits": struct((T, work.E), jnp.float32),
        "ids": struct((T, K), jnp.int32),
        "weights": struct((T, K), jnp.float32),
    }
    if work.norm_eps is not None:
        types["normed"] = struct((T, work.H), jnp.bfloat16)
    return types


def _launch(work: Work, body, name: str, inputs: dict, outputs: dict, scratch: dict, interpret):
    """Runs body(refs, program) on the grid; inputs, outputs and scratch are by names of Refs."""

    def kernel(*refs, **scratch_refs):
        gmem = dict(zip((*inputs, *outputs), refs, strict=True))
        counter = gmem.pop("counter", None)
        program = lax.axis_index("program")
        arguments = (counter,) if counter is not None else ()
        body(Refs(**gmem, scratch=scratch_refs), program, *arguments)

    results = plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        grid=(work.num_programs,),
        grid_names=("program",),
        scratch_types=scratch,
        kernel_name=name,
        interpret=plgpu.InterpretGPUParams() if interpret is True else interpret or None,
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))


def _in_one_launch(work: Work, x, gate, norm_weight) -> dict[str, jax.Array]:
    inputs = {"x": x, "gate": gate, "counter": grid_barrier.counters()}
    scratch = product_scratch(work, work.T) | choice_scratch(work)
    if work.norm_eps is not None:
        inputs["norm_weight"] = norm_weight

    def body(refs, program, counter):
        barrier = functools.partial(grid_barrier.barrier, counter, work.num_programs, program)
        start_gate(work, refs, program)
        tokens = refs.x
        if work.norm_eps is not None:
            normalise(work, refs, program)
            barrier()
            tokens = refs.normed
        multiply(work, refs, tokens, program)
        barrier()
        choose(work, refs, program)

    return _launch(work, body, "router", inputs, _output_types(work), scratch, False)


def _in_a_launch_each(work: Work, x, gate, norm_weight, interpret) -> dict[str, jax.Array]:
    """The same for interpret mode, which has no barrier of the whole grid.

    Nor has it a copy engine that fills rows past the end with zeros.
    """
    types = _output_types(work)

    def launch(body, name, inputs, outputs, scratch):
        outputs = {field: types[field] for field in outputs if field in types}
        return _launch(work, body, f"router_{name}", inputs, outputs, scratch, interpret)

    results = {}
    tokens = x
    if work.norm_eps is not None:
        results |= launch(
            functools.partial(normalise, work),
            "normalise",
            {"x": x, "norm_weight": norm_weight},
            ["normed"],
            {},
        )
        tokens = results["normed"]

    def multiply_alone(refs, program):
        start_gate(work, refs, program)
        multiply(work, refs, refs.x, program)

    results |= launch(
        multiply_alone,
        "multiply",
        {
            "x": jnp.pad(tokens, ((0, work.N - work.T), (0, 0))),
            "gate": jnp.pad(gate, ((0, work.blocks * ROWS - work.E), (0, 0))),
        },
        ["partials"],
        product_scratch(work, work.N),
    )
    results |= launch(
        functools.partial(choose, work),
        "choose",
        {"partials": results["partials"]},
        ["logits", "ids", "weights"],
        choice_scratch(work),
    )
    return results
