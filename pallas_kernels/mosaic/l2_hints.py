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
from typing import Any

import jax.numpy as jnp
from jax import named_scope
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import dialect_lowering
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm

from pallas_kernels.mosaic.device import interpreting

_SCOPE = "l2_evict_first"
_COPY = mgpu.dialect.AsyncLoadOp.OPERATION_NAME


def copy_evict_first(source, destination, full) -> None:
    """plgpu.copy_gmem_to_smem of what is not read again for a long time."""
    with named_scope(_SCOPE):
        plgpu.copy_gmem_to_smem(source, destination, full)


def prefetch_rows(source: Any, first_row: Any, count: int, columns: slice) -> None:
    """Asks for some columns of up to 128 rows to be brought to L2; nothing waits for it.

    Args:
      source: [rows, columns] bf16 in global memory.
      first_row: int32.
      count: of rows, at most 128; those beyond the array's end are left out.
      columns: with a multiple of 8 as its start, and as its length.
    """
    if interpreting():
        return
    rows, width = source.shape
    start, size = 2 * columns.start, 2 * (columns.stop - columns.start)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def prefetch(_, source, first_row):
        mgpu.utils.inline_ptx(
            f"""{{
            .reg .b64 at;
            .reg .b32 row;
            .reg .pred there;
            mov.u32 row, %tid.x;
            setp.lt.s32 there, row, {count};
            add.s32 row, row, $1;
            setp.lt.and.s32 there, row, {rows}, there;
            mad.wide.s32 at, row, {2 * width}, $0;
            @there cp.async.bulk.prefetch.L2.global [at+{start}], {size};
            }}""",
            mgpu.utils.memref_ptr(source),
            first_row.registers.item(),
            has_side_effects=True,
        )

    prefetch(source, jnp.int32(first_row))


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
