"""Where a dataset lives: names below one root, and the two ways a file may appear there.

`publish` puts a file whose name is derived from its content (repeating it is harmless); `create` puts a file at a
deterministic name only if nothing is there, which for a main shard *is* the commit. Both take a finished scratch file,
so no reader ever sees a partial one. This file has the local disk; `object_root` has object stores. The local disk is
slower than it could be: every file and every directory entry is fsynced before its name counts as taken.
"""

import errno
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, Protocol

from distill_pipe.errors import DamageError, UsageError
from distill_pipe.store.disk import make_folders, storage_failures, sync_folder, walk

SCRATCH = ".tmp"
_OBJECT_STORES: Final = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "memory")
# What a run that died before run.json was written can leave behind.
LEFT_BY_A_FALSE_START: Final = {SCRATCH, "plan"}
# run.json of ten million shards has 2 MB.
MAX_RECORD_BYTES = 16 << 20
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
# A claim is held for the time of one rename.
_CLAIM_SECONDS = 10.0


class Entry(NamedTuple):
    """A file in a listing: its name, its bytes, and when it was last written (seconds since 1970)."""

    name: str
    size: int
    modified: float


class Root(Protocol):
    """What the store needs of a place. Names are relative and use `/`."""

    def read(self, name: str) -> bytes | None:
        """The whole of a small file, or None when there is none."""

    def size(self, name: str) -> int | None:
        """Bytes of the file, or None when there is none."""

    def names(self, prefix: str) -> Iterator[str]:
        """Every file name below the folder `prefix`."""

    def entries(self, prefix: str) -> Iterator[Entry]:
        """`names` with sizes and times."""

    def fetched(self, name: str, size: int | None = None) -> AbstractContextManager[Path]:
        """The file as a local path, valid inside the context. Where it has to be copied it is refused before that
        unless it has `size` bytes."""

    def opened(self, name: str) -> AbstractContextManager[BinaryIO]:
        """The file for reading some of it: nothing else is downloaded."""

    def scratch(self) -> AbstractContextManager[Path]:
        """A private local folder, gone afterwards."""

    def publish(self, source: Path, name: str) -> None:
        """Put `source` at a content-derived name."""

    def create(self, source: Path, name: str) -> bool:
        """Put `source` at `name` unless something is there. True when this call made the file."""

    def create_bytes(self, data: bytes, name: str) -> bool:
        """`create` for a small file held in memory."""

    def publish_bytes(self, data: bytes, name: str) -> None:
        """`publish` for a small file that can be derived again from the rest of the dataset."""

    def remove(self, name: str) -> None:
        """Take a file away; nothing happens where there is none."""

    def free_bytes(self) -> int | None:
        """Room that is left, or None where nobody knows."""

    def is_unused(self) -> bool:
        """True when nothing is there but what a run that died before it was frozen left behind."""


def open_root(uri: str | os.PathLike[str]) -> Root:
    """The place that a path or URI names. Nothing is asked of it yet.

    Raises:
        UsageError: the scheme is not known, or the address is not complete.
    """
    text = os.fspath(uri)
    scheme = re.match(r"([a-z0-9+.-]+)://", text, re.IGNORECASE)
    if scheme is None:
        return LocalRoot(text)
    if scheme[1].lower() == "file":
        return LocalRoot(text[len("file://"):])
    if scheme[1].lower() == "hf":
        from distill_pipe.store.hub_root import HubRoot

        return HubRoot(text)
    if scheme[1].lower() not in _OBJECT_STORES:
        raise UsageError(f"{text}: a dataset's place is a folder, or starts with {', '.join(_OBJECT_STORES)} or hf, "
                         "and ://")
    from distill_pipe.store.object_root import ObjectRoot

    return ObjectRoot(text)


class LocalRoot:
    """A dataset in a local (or mounted) directory. Nothing is created before the first write."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        text = os.fspath(path)
        if "://" in text:
            raise UsageError(f"{text}: only local folders can be used as a dataset root")
        self.path = Path(text).absolute()

    def __str__(self) -> str:
        return str(self.path)

    def local(self, name: str) -> Path:
        """The path behind `name`, for readers that take a file. Names are relative and stay inside the root."""
        return self.path / require_inside(name)

    @contextmanager
    def fetched(self, name: str, size: int | None = None) -> Iterator[Path]:  # noqa: ARG002 - readers check the size
        """The file itself: on a local disk nothing is copied."""
        yield self.local(name)

    @contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO]:
        """The file for reading some of it."""
        with open(self.local(name), "rb") as file:
            yield file

    def read(self, name: str) -> bytes | None:
        """The whole of a small file, or None when there is none.

        Raises:
            DamageError: it is larger than any record of ours.
            OSError: it may not be read, which says nothing about what it holds.
        """
        try:
            with open(self.local(name), "rb") as file:
                data = file.read(MAX_RECORD_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
                raise
            raise DamageError(f"{self.local(name)} cannot be read: {error.strerror}") from error
        if len(data) > MAX_RECORD_BYTES:
            raise DamageError(f"{self.local(name)} has more than {MAX_RECORD_BYTES} bytes; no record is that large")
        return data

    def size(self, name: str) -> int | None:
        """Bytes of the file, or None when there is none."""
        try:
            return self.local(name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, prefix: str) -> Iterator[str]:
        """Every file name below the folder `prefix`, in order."""
        return (name for name, _ in walk(self.local(prefix), prefix))

    def entries(self, prefix: str) -> Iterator[Entry]:
        """`names` with sizes and times. A file that goes away meanwhile is left out."""
        for name, found in walk(self.local(prefix), prefix):
            try:
                stat = found.stat()
            except FileNotFoundError:
                continue
            yield Entry(name, stat.st_size, stat.st_mtime)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A private folder on the same file system, gone afterwards whatever happens.

        Raises:
            StorageFullError: the body ran out of room or quota.
            StoreError: the disk failed.
        """
        folder = self.path / SCRATCH / uuid.uuid4().hex
        with storage_failures(str(self.path)):
            try:
                make_folders(folder)
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def publish(self, source: Path, name: str) -> None:
        """Put `source` at a content-derived name; the same name always means the same bytes."""
        target = self._ready(source, name)
        os.replace(source, target)
        sync_folder(target.parent)

    def create(self, source: Path, name: str) -> bool:
        """Put `source` at `name` unless something is there. True when this call made the file."""
        target = self._ready(source, name)
        try:
            os.link(source, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if not self._rename_if_absent(source, target):
                return False
        sync_folder(target.parent)
        return True

    def create_bytes(self, data: bytes, name: str) -> bool:
        """`create` for a small file held in memory."""
        with self.scratch() as folder:
            source = folder / "part"
            source.write_bytes(data)
            return self.create(source, name)

    def publish_bytes(self, data: bytes, name: str) -> None:
        """`publish` for a small file that can be derived again from the rest of the dataset."""
        with self.scratch() as folder:
            source = folder / "part"
            source.write_bytes(data)
            self.publish(source, name)

    def is_unused(self) -> bool:
        """True when nothing is there but, at most, what a run that died before it was frozen left behind."""
        if not self.path.exists():
            return not any(parent.is_file() for parent in self.path.parents)
        return self.path.is_dir() and {p.name for p in self.path.iterdir()} <= LEFT_BY_A_FALSE_START

    def free_bytes(self) -> int | None:
        """Room that is left on the disk."""
        return shutil.disk_usage(existing_folder(self.path)).free

    def remove(self, name: str) -> None:
        """Take a file away, and a folder of scratch that is empty then; nothing happens where there is none."""
        path = self.local(name)
        path.unlink(missing_ok=True)
        if name.startswith(f"{SCRATCH}/") and path.parent != self.path / SCRATCH:
            try:
                path.parent.rmdir()
            except OSError:
                return

    def _rename_if_absent(self, source: Path, target: Path) -> bool:
        """`link` where the file system has no hard links: whoever holds the claim looks, then renames. The weaker
        guarantee: an attempt that is stopped for `_CLAIM_SECONDS` between the two counts as dead, and if it is not, its
        whole shard replaces another whole one."""
        claim = self.path / SCRATCH / f"{target.name}.claim"
        deadline = time.monotonic() + _CLAIM_SECONDS
        while not target.exists():
            try:
                os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                if time.monotonic() > deadline:
                    claim.unlink(missing_ok=True)
                time.sleep(0.05)
                continue
            try:
                if target.exists():
                    return False
                os.rename(source, target)
                return True
            finally:
                claim.unlink(missing_ok=True)
        return False

    def _ready(self, source: Path, name: str) -> Path:
        with open(source, "rb") as file:
            os.fsync(file.fileno())
        target = self.local(name)
        make_folders(target.parent)
        return target


def sha256_of(path: Path) -> str:
    """The content hash of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def existing_folder(path: Path) -> Path:
    """The nearest folder above `path`, or it itself, that is there."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def require_inside(name: str) -> str:
    """A name, if it is relative and stays inside the root; raises UsageError otherwise."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise UsageError(f"{name!r} is not a name inside the dataset")
    return name
