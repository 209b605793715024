"""A directory that is replaced whole: a save that is killed leaves the one before as it was.

    .NAME.saving-XXXX/     beside NAME, locked while its save runs
        new/               filled here, then brought to disk, then exchanged with NAME

Two directories change places in one step (Linux's renameat2 with RENAME_EXCHANGE), so that NAME is
at every moment one of the two, whole. What a killed save leaves behind is removed by the next.
"""

import contextlib
import ctypes
import fcntl
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator

from moe_jax.checkpoints.errors import CheckpointError

# What belongs to a checkpoint, of either format. All else in a directory outlives a new checkpoint.
_CHECKPOINT_FILES = re.compile(
    r"config\.json|model\.safetensors(\.index\.json)?|model-\d+-of-\d+\.safetensors"
    r"|_CHECKPOINT_METADATA|orbax\.checkpoint|commit_success\.txt"
)
_ORBAX_MARK, _ORBAX_ARRAYS = "_CHECKPOINT_METADATA", "state"

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def replacing(directory: pathlib.Path, *, overwrite: bool) -> Iterator[pathlib.Path]:
    """`replaced_whole` for a checkpoint.

    Files of `directory` that belong to no checkpoint (tokenizer.json and the like) are taken over,
    except those that the block has written.

    Raises:
      CheckpointError: as replaced_whole, or `directory` holds a checkpoint and overwrite is False.
    """
    if not overwrite and (found := checkpoint_files(directory)):
        raise CheckpointError(
            f"{directory} holds a checkpoint already ({found[0]}); pass "
            "overwrite=True to replace it"
        )
    with replaced_whole(directory, take_over=_take_over_other_files) as new:
        yield new


@contextlib.contextmanager
def replaced_whole(
    directory: pathlib.Path,
    *,
    take_over: Callable[[pathlib.Path, pathlib.Path], None] | None = None,
) -> Iterator[pathlib.Path]:
    """Yields an empty directory; when the block ends, it takes the place of `directory`.

    If the block raises, nothing has changed. Two saves to one directory at once do not mix: the
    later one wins, or fails.

    Args:
      directory: what to replace, or to make.
      take_over: take_over(old, new), called before they change places.

    Raises:
      CheckpointError: `directory` is a file, or it exists on a system or file system that cannot
        exchange directories, or is a mount point.
    """
    directory = pathlib.Path(os.path.realpath(directory))  # exchange the target, not a link to it
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; expected a directory to write to")
    if os.path.ismount(directory):
        raise CheckpointError(
            f"{directory} is a mount point, which cannot be replaced whole; expected a directory "
            "inside it"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(directory)
    holder = pathlib.Path(
        tempfile.mkdtemp(prefix=f".{directory.name}.saving-", dir=directory.parent)
    )
    try:
        with locked(holder):
            if directory.exists():
                _expect_exchange(holder, directory)
            new = holder / "new"
            new.mkdir()
            yield new
            if directory.exists():
                if take_over is not None:
                    take_over(directory, new)
                shutil.copymode(directory, new)
            sync_tree(new)
            if directory.exists():
                _exchange(new, directory)
            else:
                os.rename(new, directory)
            sync(directory.parent)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def checkpoint_files(directory: pathlib.Path) -> list[str]:
    """Names in the directory that belong to a checkpoint; none if there is no directory."""
    if not directory.is_dir():
        return []
    names = set(os.listdir(directory))
    # So common a name belongs to Orbax only beside the others.
    arrays = {_ORBAX_ARRAYS} & names if _ORBAX_MARK in names else set()
    return sorted(arrays | set(filter(_CHECKPOINT_FILES.fullmatch, names)))


def _exchange(one: pathlib.Path, other: pathlib.Path) -> None:
    """Lets two paths of one file system change places, in one step. Raises OSError."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError("this system has no renameat2")
    paths = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


def _expect_exchange(holder: pathlib.Path, directory: pathlib.Path) -> None:
    """Tries an exchange, so that a save that could not be finished is not begun."""
    one, other = holder / "one", holder / "other"
    one.mkdir()
    other.mkdir()
    try:
        _exchange(one, other)
    except OSError as error:
        raise CheckpointError(
            f"{directory} exists, and directories cannot be exchanged there ({error}); save to a "
            "new directory, which one ordinary rename puts into place"
        ) from None
    one.rmdir()
    other.rmdir()


@contextlib.contextmanager
def locked(holder: pathlib.Path) -> Iterator[None]:
    """Holds a lock on a directory; the system drops it when the process ends, however it ends.

    Raises:
      BlockingIOError: another process holds it.
    """
    handle = os.open(holder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove_leftovers(directory: pathlib.Path) -> None:
    """Removes what killed saves to this directory left; those that still run hold their lock."""
    for holder in directory.parent.glob(f".{_literal(directory.name)}.saving-*"):
        with contextlib.suppress(OSError), locked(holder):
            shutil.rmtree(holder)


def _literal(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _take_over_other_files(old: pathlib.Path, new: pathlib.Path) -> None:
    """Gives `new` what `old` holds beside a checkpoint, as hard links."""
    replaced = set(checkpoint_files(old))
    for path in sorted(old.iterdir()):
        target = new / path.name
        if path.name in replaced or os.path.lexists(target):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target, symlinks=True, copy_function=_link)
        else:
            _link(path, target)


def _link(source, target) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def sync_tree(root: pathlib.Path) -> None:
    """Brings every file and directory below root to disk: a rename may reach it before the data."""
    for folder, _, files in os.walk(root):
        for name in files:
            path = pathlib.Path(folder, name)
            if not path.is_symlink():
                sync(path)
        sync(pathlib.Path(folder))


def sync(path: pathlib.Path) -> None:
    """Brings a file, or the names in a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
