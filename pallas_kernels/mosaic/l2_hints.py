"""Copies to shared memory whose lines the L2 cache gives up first.

A launch's blocks read each weight tile and each token at about the same time, and no later launch
reads them soon. As ordinary lines, weights are many times what L2 holds and push out what the next
launch wants; many tokens do the same. A hint changes when bytes move, never which.

PTX has this hint, Mosaic GPU has no argument for it. So each copy is made under a named scope,
which lowering keeps as the operation's location. Mosaic's rule for asynchronous copies is wrapped
here by one that adds the hint. A compiler that loses the scope loses the hint and nothing else; the
lowering tests count the hints.

A second scope leaves out what Mosaic puts before each copy: a barrier of all lanes, and an arrival
of each of them at the full barrier. There one lane arrives for all.
"""

import functools

from jax import named_scope
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import dialect_lowering
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

_SCOPE = "l2_evict_first"
_ONE_LANE_SCOPE = "by_one_lane"
_COPY = mgpu.dialect.AsyncLoadOp.OPERATION_NAME
_ARRIVE = mgpu.dialect.ArriveExpectTxOp.OPERATION_NAME


def copy_evict_first(source, destination, full, *, by_one_lane: bool = False) -> None:
    """plgpu.copy_gmem_to_smem of what is not read again for a long time.

    Args:
      source, destination, full: as there.
      by_one_lane: whether the lanes have waited for each other since they last used the
        destination, as pipeline.mainloop's do. Then one lane arrives for all, and none waits.
    """
    with named_scope(_SCOPE), named_scope(_ONE_LANE_SCOPE if by_one_lane else _SCOPE):
        plgpu.copy_gmem_to_smem(source, destination, full)


def _add_hint(copy) -> None:
    """Puts another operation, with the hint, in the place of a lowered copy."""
    with ir.InsertionPoint(copy), copy.location:
        hint = llvm.inline_asm(
            ir.IntegerType.get_signless(64),
            [],
            "createpolicy.fractional.L2::evict_first.b64 $0, 1.0;",
            "=l",
        )
        nvvm.cp_async_bulk_tensor_shared_cluster_global(
            copy.dstMem,
            copy.tmaDescriptor,
            copy.coordinates,
            copy.mbar,
            copy.im2colOffsets,
            multicast_mask=copy.multicastMask,
            l2_cache_hint=hint,
            predicate=copy.predicate,
        )
    copy.operation.erase()


def _hinting(rule):
    """Mosaic's rule for a copy, followed by the hint that the copy's scope asks for."""

    @functools.wraps(rule)
    def lower(context, operation):
        location = str(operation.location)
        barriers = context.auto_barriers
        context.auto_barriers = barriers and _ONE_LANE_SCOPE not in location
        try:
            results = rule(context, operation)
        finally:
            context.auto_barriers = barriers
        if _SCOPE in location:
            _add_hint(_last_copy_before(operation))
        return results

    return lower


def _arriving_once(rule):
    """Mosaic's rule for the lanes' arrivals at a full barrier, or one lane's for all of them."""

    @functools.wraps(rule)
    def lower(context, operation):
        if _ONE_LANE_SCOPE not in str(operation.location):
            return rule(context, operation)
        barrier = mgpu.utils.DialectBarrierRef.from_barrier_memref(operation.barrier)
        mgpu.utils.inline_ptx(
            f"""{{
            .reg .pred one;
            setp.ne.b32 one, $2, 0;
            @one mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [$0], $1;
            @one mbarrier.arrive.release.cta.shared::cta.b64 _, [$0], {mgpu.utils.WARPGROUP_SIZE};
            }}""",
            barrier.get_ptr(),
            operation.expect_tx,
            arith.extui(operation.expect_tx.type, context.single_lane_predicate),
            has_side_effects=True,
        )
        return []

    return lower


def _last_copy_before(operation) -> nvvm.CpAsyncBulkTensorGlobalToSharedClusterOp:
    found = None
    for other in operation.operation.block:
        if other.operation == operation.operation:
            break
        if isinstance(other.opview, nvvm.CpAsyncBulkTensorGlobalToSharedClusterOp):
            found = other.opview
    if found is None:
        raise NotImplementedError(f"no TMA copy was found for {operation.location}")
    return found


dialect_lowering._lowerings[_COPY] = _hinting(dialect_lowering._lowerings[_COPY])
dialect_lowering._lowerings[_ARRIVE] = _arriving_once(dialect_lowering._lowerings[_ARRIVE])
