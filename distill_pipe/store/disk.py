"""What a local disk needs beyond Python's own calls: folders and names that survive a power cut, files that are whole
or absent, listings without a `stat` per file, its failures as errors of ours, and whether strangers can reach in."""

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill_pipe.errors import StorageFullError, StoreError, UsageError

# What the name of a file in the making ends in.
SCRATCH = ".part"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BROKEN = {errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ETIMEDOUT}


@contextmanager
def storage_failures(where: str) -> Iterator[None]:
    """What a file system answers when it is full or broken, as errors of ours.

    Raises:
        StorageFullError, StoreError, UsageError: it has no room, it failed, it cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError(f"{where}: {os.strerror(error.errno)}; free some room, then run the same command "
                                   "again") from error
        if error.errno in _BROKEN:
            raise StoreError(f"{where}: {os.strerror(error.errno)}; what is committed is safe, and the same command "
                             "continues") from error
        if error.errno == errno.EROFS:
            raise UsageError(f"{where} is on a read-only file system; choose another folder") from error
        raise


def walk(folder: Path, prefix: str) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """The files below a folder, with names that start with `prefix`. Folders behind links are not entered."""
    try:
        with storage_failures(str(folder)), os.scandir(folder) as found:
            held = sorted(found, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in held:
        name = f"{prefix}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from walk(Path(entry.path), name)
        elif entry.is_file():
            yield name, entry


def make_folders(folder: Path) -> None:
    """Make a folder and those above it, each entry synced."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; moved to `path` when the body is done, gone when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden, and unlike anything that a loader looks for, in case the process is killed; and not to be guessed, because
    # in a shared folder a link may wait at a name that is.
    scratch = path.parent / f".{uuid.uuid4().hex}{SCRATCH}"
    try:
        yield scratch
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def shut_out_strangers() -> None:
    """From now on nothing that this process makes can be changed by every user of the machine, whatever its umask was;
    its group is another matter."""
    os.umask(os.umask(0o022) | stat.S_IWOTH)


def open_to_all(folder: Path) -> Path | None:
    """The nearest folder, this one or above it, in which every user of the machine may rename what others have made;
    None where there is none. The sticky bit, as on /tmp, forbids that."""
    folder = folder.resolve()
    for path in (folder, *folder.parents):
        mode = path.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return path
    return None
