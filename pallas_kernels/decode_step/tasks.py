"""A step's work as data: a list of tasks, run by Python, interpreted, or as one grid on a GPU.

    Task(kind="o", work=SplitProduct(...), reads={"tokens": "attended", "weights_0": "o_proj"},
         writes={"partials": "o"}, waits_for={"merge": 256})

A task is what a range of thread blocks does. It names the arrays that it reads and writes, and the
earlier tasks whose blocks it waits for. The list is in topological order, and so are the numbers of
the blocks. So a block waits for lower-numbered blocks only (mosaic/grid_sync.py):

    block    0 .. 31    32 .. 351    352 .. 479    480 .. 511    512 .. 767    ...
    task     add_1      qkv          attend        merge         o             ...

A core takes the next block as soon as one has ended. Blocks of `o` are thus at work while attention
runs: they start to load their weights, and only then wait for what attention writes. That is how
weights cross the boundaries between tasks.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.device import launch
from pallas_kernels.mosaic.grid_sync import signal, wait, zeroed_counters
from pallas_kernels.mosaic.mailbox import Mailbox
from pallas_kernels.mosaic.stamps import BEGIN, CORE, END, WAITED, stamp, stamps_type


class Work(Protocol):
    """What one kind of thread block does; its methods know arrays by their roles.

    Attributes:
      num_blocks: thread blocks.
      num_counters: counters that its blocks signal.
      arrivals: signals that each counter gets.
      bytes_read: of weights and caches, by all blocks; at most.
    """

    num_blocks: int
    num_counters: int
    arrivals: int
    bytes_read: int

    @property
    def out_types(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What it writes, by role."""
        ...

    def shared_types(self) -> tuple:
        """Groups of shared memory; each group takes the same place as the one before."""
        ...

    def barrier_types(self) -> Any:
        """Its barriers."""
        ...

    def run(
        self,
        block_id: Any,
        arrays: Mapping[str, Any],
        shared: tuple,
        full: Any,
        wait: Callable[..., None],
        signal: Callable[..., None],
    ) -> None:
        """One thread block, in a kernel.

        Args:
          block_id: among this task's.
          arrays: refs in global memory by role.
          shared: as shared_types.
          full: as barrier_types.
          wait: wait(kind, counter=0) returns once that task has sent all signals of the counter.
          signal: signal(counter=0), see grid_sync; each block does it once.
        """
        ...

    def reference(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """All blocks' work in plain jnp; arrays and results by role."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of work in a list.

    Attributes:
      kind: its name, once in a list.
      work: what its blocks do.
      reads: role -> array.
      writes: role -> array, which this task is the first to write.
      updates: role -> array that it changes in place.
      posts: role -> array that it hands on in a mailbox (mosaic/mailbox.py). Tasks that read the
        array wait for its values, and need no signal for them.
      waits_for: earlier kind -> how many of this task's blocks wait for each of its counters.
    """

    kind: str
    work: Work
    reads: Mapping[str, str]
    writes: Mapping[str, str]
    updates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    posts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    waits_for: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def made(self) -> dict[str, str]:
        """Role -> array, of all that it makes."""
        return {**self.writes, **self.posts}

    def among(self, kinds: Collection[str]) -> "Task":
        """The same in a grid of these kinds: what other grids wrote is there as it begins."""
        waits_for = {kind: count for kind, count in self.waits_for.items() if kind in kinds}
        return dataclasses.replace(self, waits_for=waits_for)


def check_order(tasks: Sequence[Task], inputs: Sequence[str]) -> None:
    """Raises a ValueError if a task reads or waits for what no earlier one makes."""
    known, kinds = set(inputs), set()
    for task in tasks:
        wanted = {*task.reads.values(), *task.updates.values()}
        if missing := sorted(wanted - known):
            raise ValueError(f"task {task.kind!r} reads {missing}, which no earlier task writes")
        if missing := sorted(set(task.waits_for) - kinds):
            raise ValueError(f"task {task.kind!r} waits for {missing}, which are no earlier tasks")
        if task.kind in kinds:
            raise ValueError(f"task {task.kind!r} stands twice in the list")
        if twice := sorted(known & set(task.made.values())):
            raise ValueError(f"task {task.kind!r} writes {twice}, which exist already")
        known |= set(task.made.values())
        kinds.add(task.kind)


def run_in_python(tasks: Sequence[Task], arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The tasks' references one after the other: the oracle. Returns all arrays by name."""
    check_order(tasks, tuple(arrays))
    known = dict(arrays)
    for task in tasks:
        given = {role: known[name] for role, name in (task.reads | task.updates).items()}
        found = task.work.reference(given)
        known |= {name: found[role] for role, name in (task.made | task.updates).items()}
    return known


def mailbox_shapes(tasks: Sequence[Task]) -> dict[str, tuple[int, ...]]:
    """Of the arrays that tasks hand on in mailboxes, by name."""
    return {
        name: task.work.out_types[role].shape for task in tasks for role, name in task.posts.items()
    }


def run_as_grid(
    tasks: Sequence[Task],
    arrays: Mapping[str, jax.Array],
    results: Sequence[str],
    *,
    name: str,
    interpret: Any,
    stamped: bool = False,
    mailboxes: Mapping[str, tuple[jax.Array, jax.Array]] | None = None,
) -> dict[str, Any]:
    """All tasks as one grid.

    Args:
      tasks: in topological order.
      arrays: what they read, by name; a BlockScaledFp8 is one array.
      results: which of the arrays that they write or change are wanted.
      name: of the kernel.
      interpret: as in mosaic.device.launch.
      stamped: whether the result has "stamps", too, see mosaic/stamps.py.
      mailboxes: for each of mailbox_shapes an empty one, and one to be emptied.

    Returns:
      The results by name; if there are any, "mailboxes" as the next grid takes them.
    """
    check_order(tasks, tuple(arrays))
    mailboxes = {} if mailboxes is None else dict(mailboxes)
    arrays = dict(arrays)
    for array, pair in mailboxes.items():
        arrays |= dict(zip(_mailbox_names(array), pair, strict=True))
    # A quantised array is two leaves.
    operands, tree = jax.tree.flatten(list(arrays.values()))
    counts = [len(jax.tree.leaves(array)) for array in arrays.values()]
    firsts = dict(zip(arrays, itertools.accumulate(counts, initial=0), strict=False))
    types = {
        name: task.work.out_types[role] for task in tasks for role, name in task.writes.items()
    }
    changed = [name for task in tasks for name in task.updates.values()]
    changed += [part for name in mailboxes for part in _mailbox_names(name)]
    types |= {
        name: jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in changed
    }
    first_block, places = _first_blocks(tasks), _places(tasks)
    num_counters = sum(task.work.num_counters for task in tasks)
    if stamped:
        types["stamps"] = stamps_type(first_block[-1])
    outputs = list(types)

    def kernel(block_id, *refs):
        counters = refs[len(operands)]
        given = jax.tree.unflatten(tree, refs[: len(operands)])
        known = dict(zip(arrays, given, strict=True))
        known |= dict(zip(outputs, refs[len(operands) + 1 :], strict=True))
        for array in mailboxes:
            known[array] = Mailbox(*(known[part] for part in _mailbox_names(array)))
        stamps = known.get("stamps")
        stamp(stamps, block_id, BEGIN)
        mark = functools.partial(stamp, stamps, block_id, WAITED)
        for task, first in zip(tasks, first_block, strict=False):
            local = block_id - first

            @pl.when((local >= 0) & (local < task.work.num_blocks))
            def _(task=task, local=local):
                # What one task allocates takes the place of what another one does.
                groups = task.work.shared_types()
                pl.run_scoped(
                    functools.partial(_run_block, task, local, known, counters, places, mark),
                    shared=plgpu.RefUnion(*groups) if groups else (),
                    barriers=task.work.barrier_types(),
                )

        stamp(stamps, block_id, END)
        stamp(stamps, block_id, CORE)

    @jax.custom_batching.sequential_vmap  # the counters are for one call at a time
    def call(*operands):
        return launch(
            kernel,
            name=name,
            num_blocks=first_block[-1],
            out_type=tuple(types.values()),
            in_place={firsts[name]: outputs.index(name) for name in changed},
            interpret=interpret,
        )(*operands, zeroed_counters(num_counters))

    found = dict(zip(outputs, call(*operands), strict=True))
    wanted = (*results, *(["stamps"] if stamped else []))
    # What was posted is stale for the next grid, and what was emptied is empty.
    turned = {
        name: tuple(found[part] for part in reversed(_mailbox_names(name))) for name in mailboxes
    }
    found = {name: found[name] for name in wanted}
    return found | ({"mailboxes": turned} if mailboxes else {})


def _mailbox_names(name: str) -> tuple[str, str]:
    return f"{name} full", f"{name} stale"


def _first_blocks(tasks: Sequence[Task]) -> list[int]:
    """Each task's first block, and the number of all blocks behind them."""
    return [0, *itertools.accumulate(task.work.num_blocks for task in tasks)]


class _Place(NamedTuple):
    """A task's first counter, the signals that each gets, and how many blocks wait for each."""

    first: int
    arrivals: int
    waiting: int


def _places(tasks: Sequence[Task]) -> dict[str, _Place]:
    places, first = {}, 0
    for task in tasks:
        waiting = sum(other.waits_for.get(task.kind, 0) for other in tasks)
        places[task.kind] = _Place(first, task.work.arrivals, waiting)
        first += task.work.num_counters
    return places


def _run_block(task, block_id, known, counters, places, mark, *, shared, barriers) -> None:
    def wait_for(kind: str, counter: Any = 0) -> None:
        if kind not in task.waits_for:
            return
        place = places[kind]
        wait(counters, place.first + counter, place.arrivals, place.waiting)
        mark()

    def send(counter: Any = 0) -> None:
        # Those who wait set a counter back to zero. Without any it would stay, and other grids with
        # as many counters have the same ones.
        if places[task.kind].waiting:
            signal(counters, places[task.kind].first + counter)

    names = task.reads | task.made | task.updates
    arrays = {role: known[name] for role, name in names.items()}
    task.work.run(block_id, arrays, tuple(shared), barriers, wait_for, send)
