"""Where a dataset lives: names below one root, and the two ways a file may appear there.

`publish` puts a file whose name is derived from its content (repeating it is harmless); `create` puts a file at a
deterministic name only if nothing is there, which for a main shard *is* the commit. Both take a finished scratch file,
so no reader ever sees a partial one. Local disk only, and slower than it could be: every file and every directory
entry is fsynced before its name counts as taken.
"""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from distill_pipe.errors import DamageError, StorageFullError, UsageError

SCRATCH = ".tmp"
# run.json of ten million shards has 2 MB.
MAX_RECORD_BYTES = 16 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Root(Protocol):
    """What the store needs of a place. Names are relative and use `/`."""

    def read(self, name: str) -> bytes | None:
        """The whole of a small file, or None when there is none."""

    def size(self, name: str) -> int | None:
        """Bytes of the file, or None when there is none."""

    def names(self, prefix: str) -> Iterator[str]:
        """Every file name below the folder `prefix`, in order."""

    def fetched(self, name: str) -> AbstractContextManager[Path]:
        """The file as a local path, valid inside the context."""

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

    def is_unused(self) -> bool:
        """True when nothing is there but what a run that died before it was frozen left behind."""


def open_root(uri: str | os.PathLike[str]) -> "LocalRoot":
    """The place that a path or URI names.

    Raises:
        UsageError: the scheme is not known.
    """
    return LocalRoot(uri)


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
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts:
            raise UsageError(f"{name!r} is not a name inside the dataset")
        return self.path / name

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """The file itself: on a local disk nothing is copied."""
        yield self.local(name)

    def read(self, name: str) -> bytes | None:
        """The whole of a small file, or None when there is none.

        Raises:
            DamageError: it is larger than any record of ours.
        """
        try:
            with open(self.local(name), "rb") as file:
                data = file.read(MAX_RECORD_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
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
        base = self.local(prefix)
        yield from sorted(str(p.relative_to(self.path)) for p in base.rglob("*") if p.is_file())

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A private folder on the same file system, gone afterwards whatever happens.

        Raises:
            StorageFullError: the body ran out of room or quota.
        """
        folder = self.path / SCRATCH / uuid.uuid4().hex
        try:
            _make_folders(folder)
            yield folder
        except OSError as error:
            if error.errno in _FULL:
                raise StorageFullError(f"{self.path}: {os.strerror(error.errno or 0)}; free some room, then run the "
                                       "same command again") from error
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, source: Path, name: str) -> None:
        """Put `source` at a content-derived name; the same name always means the same bytes."""
        target = self._ready(source, name)
        os.replace(source, target)
        _sync_folder(target.parent)

    def create(self, source: Path, name: str) -> bool:
        """Put `source` at `name` unless something is there. True when this call made the file."""
        target = self._ready(source, name)
        try:
            os.link(source, target)
        except FileExistsError:
            return False
        _sync_folder(target.parent)
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
        return self.path.is_dir() and {p.name for p in self.path.iterdir()} <= {SCRATCH, "plan"}

    def _ready(self, source: Path, name: str) -> Path:
        with open(source, "rb") as file:
            os.fsync(file.fileno())
        target = self.local(name)
        _make_folders(target.parent)
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


def _make_folders(folder: Path) -> None:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
