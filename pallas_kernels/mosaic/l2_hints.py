"""Copies to shared memory whose lines the L2 cache gives up first.

A launch's blocks read each weight tile and each token at about the same time, and no later launch
reads them soon. As ordinary lines, weights are many times what L2 holds and push out what the next
launch wants; many tokens do the same. A hint changes when bytes move, never which.

PTX has this hint, Mosaic GPU has no argument for it. So each copy is made under a named scope,
which lowering keeps as the operation's location. Mosaic's rule for asynchronous copies is wrapped
here by one that adds the hint. A compiler that loses the scope loses the hint and nothing else; the
lowering tests count the hints.
"""

import functools

from jax import named_scope
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import dialect_lowering
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm

_SCOPE = "l2_evict_first"
_COPY = mgpu.dialect.AsyncLoadOp.OPERATION_NAME


def copy_evict_first(source, destination, full) -> None:
    """plgpu.copy_gmem_to_smem of what is not read again for a long time."""
    with named_scope(_SCOPE):
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
        results = rule(context, operation)
        if _SCOPE in str(operation.location):
            _add_hint(_last_copy_before(operation))
        return results

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
