"""Values that say themselves whether they have been written: how a task hands on little data.

    post       stores values; the same places of the other mailbox become empty
    collect    loads values, again and again until none is empty

A signal (grid_sync.py) waits until all that its block wrote can be seen, and its reader loads only
after it has seen the signal: some 2 us together. A word of a mailbox is its own signal, because an
empty one has all bits set, which is a NaN that no arithmetic makes. So nothing is waited for but
the value itself.

Mailboxes come in pairs. A launch posts into one, and empties the one that the launch before it has
filled; the next launch takes them the other way round:

    launch      1             2             3
    posts       A             B             A
    empties     B             A             B

What one launch posts, the next one must empty, whether or not it posts there itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.device import core_count, interpreting, launch
from pallas_kernels.mosaic.words import (
    EMPTY,
    assemble,
    fill_words,
    load_words,
    places_of,
    store_words,
)


class Mailbox(NamedTuple):
    """A place of a pair of mailboxes, in a kernel: refs of one shape, float32.

    Attributes:
      full: what this launch posts into.
      stale: what it empties.
    """

    full: Any
    stale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.full.shape

    @property
    def at(self) -> "_At":
        return _At(self)


class _At(NamedTuple):
    mailbox: Mailbox

    def __getitem__(self, index) -> Mailbox:
        return Mailbox(*(ref.at[index] for ref in self.mailbox))


class Piece(NamedTuple):
    """What one array of `collect` holds.

    Attributes:
      ref: float32 in global memory, or a Mailbox.
      layout: of the array; None for a scalar.
      shape: of the array; None takes the ref's.
      limit: None, or how many of the first dimension are there, an int or int32; the rest is zeros.
    """

    ref: Any
    layout: Any
    shape: tuple[int, ...] | None = None
    limit: Any = None


def fresh_mailboxes(
    shapes: Mapping[str, tuple[int, ...]], interpret: Any
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """A pair of empty mailboxes of each shape, float32, all filled by one launch.

    XLA would fill one array for all of a shape, and copy it: some 40 kernels of 1 us.

    Args:
      shapes: by name.
      interpret: as in mosaic.device.launch.
    """
    num_blocks = core_count(interpret)

    def kernel(block_id, *refs):
        for ref in refs:
            _fill(ref, block_id, num_blocks)

    filled = launch(
        kernel,
        name="fresh_mailboxes",
        num_blocks=num_blocks,
        out_type=[
            jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes.values() for _ in range(2)
        ],
        interpret=interpret,
    )()
    return dict(zip(shapes, zip(filled[::2], filled[1::2], strict=True), strict=True))


def _fill(ref: Any, block_id: Any, num_blocks: int) -> None:
    """One block's part of making all of a ref empty."""
    if interpreting():
        pl.when(block_id == 0)(lambda: ref.__setitem__(..., _empty_words(ref.shape)))
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def fill(_, ref, block_id):
        fill_words(ref, block_id.registers.item(), num_blocks)

    fill(ref, jnp.int32(block_id))


def collect(pieces: Sequence[Piece]) -> list[jax.Array]:
    """The pieces' values; all loads are under way at once. Those of a Mailbox are waited for.

    Other refs must be readable already; they are taken so that all loads overlap.

    Raises:
      RuntimeError: interpreted, a place is empty: blocks ran in another order than that of their
        numbers, or one reads what a later one posts.
    """
    if interpreting():
        return [_interpreted_piece(piece) for piece in pieces]
    shapes = [_shape(piece) for piece in pieces]
    layouts = [plgpu.Layout.WG_SPLAT if p.layout is None else p.layout for p in pieces]
    polled = [isinstance(piece.ref, Mailbox) for piece in pieces]
    limited = [piece.limit is not None for piece in pieces]
    limits = [jnp.int32(piece.limit) for piece in pieces if piece.limit is not None]

    @plgpu.inline_mgpu(
        arg_types=([plgpu.RefType()] * len(pieces), [plgpu.Layout.WG_SPLAT] * len(limits)),
        return_type=[
            plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)
            for shape, layout in zip(shapes, layouts, strict=True)
        ],
    )
    def load(_, refs, limits):
        limits = iter(limits)
        arrays = [
            places_of(ref, shape, layout.to_mgpu(), next(limits) if has_limit else None)
            for ref, shape, layout, has_limit in zip(refs, shapes, layouts, limited, strict=True)
        ]
        words = load_words(arrays, polled)
        return [
            assemble(array, shape, layout.to_mgpu())
            for array, shape, layout in zip(words, shapes, layouts, strict=True)
        ]

    return load([_readable(piece.ref) for piece in pieces], limits)


def post(
    target: Any, value: jax.Array, layout: Any, *, limit: Any = None, transposed: bool = False
) -> None:
    """Stores value in a Mailbox, whose stale place becomes empty; or in a float32 ref.

    Args:
      target: of value's shape; if transposed, of that turned around. With a limit it may be
        shorter.
      value: float32.
      layout: of value, or what it is brought to.
      limit: None, or how many of a mailbox's first dimension are posted, an int or int32. A ref
        gets all.
      transposed: whether target[j, i] becomes value[i, j].
    """
    refs, limit = (list(target), limit) if isinstance(target, Mailbox) else ([target], None)
    if len(refs) == 1 and (not transposed or layout is plgpu.Layout.WGMMA):
        target = target.transpose((1, 0)) if transposed else target
        layout = plgpu.Layout.WGMMA_TRANSPOSED if transposed else layout
        target[...] = plgpu.layout_cast(value, layout)
        return
    if interpreting():
        _interpreted_post(refs, value.T if transposed else value, limit)
        return
    limits = [] if limit is None else [jnp.int32(limit)]
    shape = value.shape

    @plgpu.inline_mgpu(
        arg_types=([plgpu.RefType()] * len(refs), layout, [plgpu.Layout.WG_SPLAT] * len(limits))
    )
    def store(_, refs, value, limits):
        limit = limits[0] if limits else None
        for ref, new in zip(refs, (value, None), strict=False):
            store_words(places_of(ref, shape, layout.to_mgpu(), limit, transposed), new)

    store(refs, plgpu.layout_cast(value, layout), limits)


def empty(
    target: Mailbox, shape: tuple[int, ...], layout: Any, *, transposed: bool = False
) -> None:
    """Empties a place where the launch before may have posted, and this one does not.

    Arguments as post's; shape is that of the value that is not there.
    """
    if interpreting():
        target.stale[...] = _empty_words(target.shape)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def store(_, ref):
        store_words(places_of(ref, shape, layout.to_mgpu(), None, transposed), None)

    store(target.stale)


def _shape(piece: Piece) -> tuple[int, ...]:
    return _readable(piece.ref).shape if piece.shape is None else piece.shape


def _readable(ref):
    return ref.full if isinstance(ref, Mailbox) else ref


def _empty_words(shape) -> jax.Array:
    return lax.bitcast_convert_type(jnp.full(shape, EMPTY, jnp.uint32), jnp.float32)


def _interpreted_post(refs, value, limit) -> None:
    if limit is not None:
        value = value[tuple(slice(0, size) for size in refs[0].shape)]
    words = jnp.minimum(lax.bitcast_convert_type(value, jnp.uint32), jnp.uint32(EMPTY - 1))
    value = lax.bitcast_convert_type(words, jnp.float32)
    for ref, new in zip(refs, (value, _empty_words(value.shape)), strict=False):
        if limit is not None:
            place = lax.broadcasted_iota(jnp.int32, new.shape, 0)
            new = jnp.where(place < limit, new, ref[...])
        ref[...] = new


def _interpreted_piece(piece: Piece) -> jax.Array:
    value, shape = _readable(piece.ref)[...], _shape(piece)
    if value.shape != shape:
        value = jnp.pad(value, [(0, n - m) for n, m in zip(shape, value.shape, strict=True)])
    there = True
    if piece.limit is not None:
        there = lax.broadcasted_iota(jnp.int32, shape, 0) < piece.limit
    if isinstance(piece.ref, Mailbox):
        words = lax.bitcast_convert_type(value, jnp.uint32)
        jax.debug.callback(_check_full, jnp.any((words == jnp.uint32(EMPTY)) & there))
    return jnp.where(there, value, 0.0)


def _check_full(missing) -> None:
    if missing:
        raise RuntimeError(
            "a thread block collects what no block has posted; expected all of it, because those "
            "that post have lower numbers"
        )
