"""Where corpus files are, and how they are read: local paths, `hf://datasets/...`, and object stores.

Remote files are read in place, as far as they are wanted, and never copied whole: `--limit 100` of a dataset of a
terabyte fetches some megabytes. The price is that a run reads them twice, once to check and once to freeze; `prepare`
makes a local file of a corpus that is used more than once.

    hf://datasets/OWNER/NAME[@REVISION][/PATH]    a file or folder of a dataset on the model hub, or all of it
    s3://BUCKET/KEY  gs://  az://  https://       an object
"""

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

from distill_pipe.errors import UsageError
from distill_pipe.store.root import sha256_of

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet")
_HUB = re.compile(r"^hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.*))?$")
_CHUNK_BYTES = 4 << 20


class Source(Protocol):
    """One corpus file."""

    @property
    def name(self) -> str:
        """Its file name, which says of what kind it is."""

    @property
    def address(self) -> str:
        """Where it is, for messages."""

    def open(self) -> IO[bytes]:
        """The file, for reading at any place."""

    def sha256(self) -> str:
        """The hash of its content."""


def find_sources(address: str) -> list[Source]:
    """The files that an address names, in the order of their names.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    if address.startswith("hf://"):
        return _hub_sources(address)
    if "://" in address:
        return [_checked(_Object(address))]
    path = Path(address)
    if path.is_dir():
        raise UsageError(f"corpus {path}: this is a folder; give the files in it, with --corpus for each")
    if not path.is_file():
        raise UsageError(f"corpus {path}: there is no such file")
    if path.stat().st_size == 0:
        raise UsageError(f"corpus {path}: the file is empty")
    return [_checked(_Local(path))]


def _checked(source: Source) -> Source:
    if not source.name.endswith(SUFFIXES):
        raise UsageError(f"corpus {source.address}: unknown kind of file; known are {', '.join(SUFFIXES)}")
    return source


@dataclass(frozen=True, slots=True)
class _Local:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def address(self) -> str:
        return str(self.path)

    def open(self) -> IO[bytes]:
        return open(self.path, "rb")

    def sha256(self) -> str:
        return sha256_of(self.path)


@dataclass(frozen=True, slots=True)
class _HubFile:
    """A file of a dataset at one commit; what is stored apart (LFS) is known by its hash without being read."""

    path: str
    listed_sha256: str | None

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def address(self) -> str:
        return f"hf://{self.path}"

    def open(self) -> IO[bytes]:
        from huggingface_hub import HfFileSystem

        files = HfFileSystem()
        return _ranged(self.address, lambda: int(files.info(self.path)["size"]),
                       lambda start, stop: bytes(files.cat_file(self.path, start=start, end=stop)))

    def sha256(self) -> str:
        return self.listed_sha256 or _hash(self)


def _hub_sources(address: str) -> list[Source]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    found = _HUB.match(address)
    if found is None:
        raise UsageError(f"corpus {address}: write hf://datasets/OWNER/NAME[@REVISION][/PATH]")
    repo, revision, path = found[1], found[2], (found[3] or "").strip("/")
    api = HfApi()
    try:
        commit = api.dataset_info(repo, revision=revision, timeout=30).sha
        listed = list(api.list_repo_tree(repo, repo_type="dataset", revision=commit, recursive=True))
    except Exception as error:  # noqa: BLE001 - the class of a failed connection differs by version of huggingface_hub
        raise UsageError(f"corpus {address} cannot be had from the model hub: {_first_line(error)}") from None
    files = {f.path: None if f.lfs is None else str(f.lfs.sha256) for f in listed if isinstance(f, RepoFile)
             and f.path.endswith(SUFFIXES) and (not path or f.path == path or f.path.startswith(f"{path}/"))}
    if not files:
        raise UsageError(f"corpus {address}: no file of a known kind is there; known are {', '.join(SUFFIXES)}")
    return [_HubFile(f"datasets/{repo}@{commit}/{name}", files[name]) for name in _training_files(sorted(files))]


def _training_files(paths: Sequence[str]) -> list[str]:
    """Those of the split for training, where files are told apart by split."""
    training = [path for path in paths if re.search(r"(^|[/_-])train", path)]
    return training or list(paths)


@dataclass(frozen=True, slots=True)
class _Object:
    """An object of a store. Settings come from the environment, as for a dataset's root."""

    uri: str

    @property
    def name(self) -> str:
        return self.uri.rpartition("/")[2]

    @property
    def address(self) -> str:
        return self.uri

    def open(self) -> IO[bytes]:
        import obstore
        from obstore.store import from_url

        folder, _, key = self.uri.rpartition("/")
        stores: list[Any] = []

        def size() -> int:
            stores.append(from_url(folder))
            return int(obstore.head(stores[0], key)["size"])

        return _ranged(self.uri, size, lambda start, stop: bytes(obstore.get_range(stores[0], key, start=start,
                                                                                   end=stop)))

    def sha256(self) -> str:
        return _hash(self)


def _ranged(address: str, size: Callable[[], int], fetch: Callable[[int, int], bytes]) -> IO[bytes]:
    """A remote file whose parts are fetched as they are read.

    Raises:
        UsageError: it is not there, or empty.
    """
    try:
        length = size()
    except Exception as error:  # noqa: BLE001 - hub and stores fail in classes of their own, which differ by version
        raise UsageError(f"corpus {address} cannot be read: {_first_line(error)}") from None
    if length == 0:
        raise UsageError(f"corpus {address}: the file is empty")
    return cast(IO[bytes], io.BufferedReader(_Ranges(address, length, fetch), _CHUNK_BYTES))


class _Ranges(io.RawIOBase):
    """Ranges of a remote file as a file."""

    def __init__(self, address: str, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._address, self._size, self._fetch, self._at = address, size, fetch, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        length = min(len(view), self._size - self._at)
        if length <= 0:
            return 0
        try:
            view[:length] = self._fetch(self._at, self._at + length)
        except Exception as error:
            # Readers of files know this class, and hub and stores have their own.
            raise OSError(f"{self._address}: {_first_line(error)}") from error
        self._at += length
        return length


def _hash(source: Source) -> str:
    with source.open() as file:
        digest = hashlib.sha256()
        while block := file.read(_CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
