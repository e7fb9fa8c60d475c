"""A dataset in an object store: S3 and what speaks its language, Google Cloud Storage, Azure.

The commit is a PUT that succeeds only where nothing is. When the store answers that something is there, that is looked
at before it is believed: an answer can be lost after the object was stored, and some stores say so when nothing was.
Scratch is a local temporary folder, and a file is read from a copy in one. The trade-off: that copy costs room for one
file per reader, and buys that readers of Parquet see local files, whole and of the recorded size.

Settings come from the environment, as for the vendors' own tools: AWS_ENDPOINT_URL, AWS_REGION, GOOGLE_SERVICE_ACCOUNT,
AZURE_STORAGE_ACCOUNT_NAME and so on; AWS_, GOOGLE_ or AZURE_ALLOW_HTTP lets requests go without TLS. `memory://` lives
and dies with the process.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeVar, cast

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import MemoryStore, ObjectStore, from_url

from distill_pipe.errors import DamageError, DistillPipeError, StorageFullError, UsageError
from distill_pipe.store.disk import storage_failures
from distill_pipe.store.ranges import Ranges
from distill_pipe.store.retry import BUDGET_SECONDS, FIRST_SECONDS, UnsettledError, patiently
from distill_pipe.store.root import LEFT_BY_A_FALSE_START, MAX_RECORD_BYTES, Entry, require_inside
from distill_pipe.store.uploads import UPLOADS

if TYPE_CHECKING:
    from obstore import ObjectMeta

# A request is given up after five minutes: a part must get through a slow line in that time.
_PART_BYTES: Final = 16 << 20
_REQUEST_TIMEOUT: Final = "300s"
_PART_RETRIES: Final = 5
_MEMORY: Final[dict[str, MemoryStore]] = {}
Answer = TypeVar("Answer")


class ObjectRoot:
    """A dataset below a URI of an object store."""

    def __init__(self, uri: str) -> None:
        self._uri = uri.rstrip("/")
        self._process = os.getpid()
        self._store = _opened(self._uri, retries=0)
        # Of an upload in parts the library tries each again, or a single refusal would cost all of them.
        self._steady = _opened(self._uri, _PART_RETRIES)
        self._seconds = FIRST_SECONDS

    def __str__(self) -> str:
        return self._uri

    def __reduce__(self) -> tuple[type["ObjectRoot"], tuple[str]]:
        # Connections, and what is in memory, stay in this process.
        return ObjectRoot, (self._uri,)

    def read(self, name: str) -> bytes | None:
        """The whole of a small object, or None when there is none.

        Raises:
            DamageError: it is larger than any record of ours.
        """
        def get() -> bytes:
            found = obstore.get(self._store, name)
            if found.meta["size"] > MAX_RECORD_BYTES:
                raise DamageError(f"{self._uri}/{name} has more than {MAX_RECORD_BYTES} bytes; no record is that large")
            return bytes(found.bytes())

        return self._asked_or_none(get, name)

    def size(self, name: str) -> int | None:
        """Bytes of the object, or None when there is none."""
        head = self._asked_or_none(lambda: obstore.head(self._store, name), name)
        return None if head is None else head["size"]

    def names(self, prefix: str) -> Iterator[str]:
        """Every name below the folder `prefix`, in the store's order; one request per 1,000."""
        return (entry.name for entry in self.entries(prefix))

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Every object below the folder `prefix`, in the store's order; one request per 1,000."""
        last: str | None = None
        pages = self._pages(prefix, last)

        def page() -> "Sequence[ObjectMeta] | None":
            nonlocal pages
            try:
                return next(pages, None)
            except BaseError:
                # A listing that failed is over and would look complete.
                pages = self._pages(prefix, last)
                raise

        while (found := self._asked(page, prefix)) is not None:
            for meta in found:
                last = meta["path"]
                yield Entry(last, meta["size"], meta["last_modified"].timestamp())

    @contextmanager
    def fetched(self, name: str, size: int | None = None) -> Iterator[Path]:
        """A copy of the object, gone afterwards. Messages of readers name the object and not the copy.

        Raises:
            DamageError: there is none, or it has not `size` bytes; nothing was downloaded then.
            StorageFullError: there is no room for the copy.
        """
        with self.scratch() as folder:
            path = folder / Path(name).name
            self._download(name, path, size)
            try:
                yield path
            except DistillPipeError as error:
                text = str(error)
                if str(path) not in text:
                    raise
                raise type(error)(text.replace(str(path), f"{self._uri}/{name}")) from error

    @contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO]:
        """The object for reading some of it: what is read is asked for, and no more.

        Raises:
            FileNotFoundError: there is none.
        """
        head = self._asked(lambda: obstore.head(self._store, name), name)
        yield cast(BinaryIO, Ranges(head["size"], lambda first, stop: self._part(name, first, stop, head["e_tag"])))

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A private local folder, gone afterwards whatever happens. TMPDIR says where.

        Raises:
            StorageFullError: the body ran out of room or quota.
        """
        with storage_failures(f"{tempfile.gettempdir()} (TMPDIR)"):
            folder = Path(tempfile.mkdtemp(prefix="distill-pipe-"))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def publish(self, source: Path, name: str) -> None:
        """Put `source` at a content-derived name; the same name always means the same bytes."""
        store = self._store if source.stat().st_size <= _PART_BYTES else self._steady

        def put() -> None:
            with UPLOADS.slot():
                obstore.put(store, name, source, chunk_size=_PART_BYTES, max_concurrency=UPLOADS.limit)

        self._asked(put, name)

    def create(self, source: Path, name: str) -> bool:
        """Put `source` at `name` unless something is there. True when this call made the object."""
        return self.create_bytes(source.read_bytes(), name)

    def create_bytes(self, data: bytes, name: str) -> bool:
        """`create` for bytes held in memory. What is there counts as made by this call when it is the same bytes: that
        is an answer that was lost, or an attempt that cannot be told from this one."""
        def put() -> bool:
            try:
                with UPLOADS.slot():
                    obstore.put(self._store, name, data, mode="create", use_multipart=False)
                return True
            except AlreadyExistsError as error:
                size = self.size(name)
                if size is None:
                    raise UnsettledError(f"{error}") from error
                return size == len(data) and self._same(name, data)

        return self._asked(put, name)

    def publish_bytes(self, data: bytes, name: str) -> None:
        """`publish` for a small object that can be derived again from the rest of the dataset."""
        def put() -> None:
            with UPLOADS.slot():
                obstore.put(self._store, name, data, use_multipart=False)

        self._asked(put, name)

    def remove(self, name: str) -> None:
        """Take the object away; nothing happens where there is none."""
        try:
            self._asked(lambda: obstore.delete(self._store, require_inside(name)), name)
        except FileNotFoundError:
            return

    def free_bytes(self) -> int | None:
        """Nobody knows."""
        return None

    def is_unused(self) -> bool:
        """True when nothing is there but, at most, what a run that died before it was frozen left behind."""
        found = self._asked(lambda: obstore.list_with_delimiter(self._store), "")
        tops = {prefix.rstrip("/") for prefix in found["common_prefixes"]}
        return not found["objects"] and tops <= LEFT_BY_A_FALSE_START

    def _pages(self, prefix: str, after: str | None) -> "Iterator[Sequence[ObjectMeta]]":
        return iter(obstore.list(self._store, require_inside(prefix), offset=after, chunk_size=1000))

    def _same(self, name: str, data: bytes) -> bool:
        with self.fetched(name) as path:
            return path.read_bytes() == data

    def _download(self, name: str, path: Path, size: int | None) -> None:
        head = self._asked_or_none(lambda: obstore.head(self._store, name), name)
        if head is None:
            raise DamageError(f"{self._uri}/{name} is missing")
        if size is not None and head["size"] != size:
            raise DamageError(f"{self._uri}/{name} has {head['size']} bytes, expected {size}")
        if shutil.disk_usage(path.parent).free < head["size"]:
            raise StorageFullError(f"{path.parent.parent} has no room for a copy of {self._uri}/{name}, which has "
                                   f"{head['size']} bytes; point TMPDIR to a larger disk")
        with open(path, "wb") as file:
            for first in range(0, head["size"], _PART_BYTES):
                file.write(self._part(name, first, min(first + _PART_BYTES, head["size"]), head["e_tag"]))

    def _part(self, name: str, first: int, stop: int, etag: str | None) -> bytes:
        """Some bytes of an object, of that version of it which `etag` names: parts of two must not be mixed."""
        def get() -> bytes:
            try:
                found = obstore.get(self._store, name, options={"range": (first, stop), "if_match": etag})
            except PreconditionError:
                raise DamageError(f"{self._uri}/{name} was replaced while it was read") from None
            data = bytes(found.bytes())
            if len(data) != stop - first:
                raise UnsettledError("the connection ended in the middle of the body")
            return data

        try:
            return self._asked(get, name)
        except FileNotFoundError:
            raise DamageError(f"{self._uri}/{name} was removed while it was read") from None

    def _asked_or_none(self, call: Callable[[], Answer], name: str) -> Answer | None:
        """None where the object is not there; a missing bucket is an error."""
        try:
            return self._asked(call, name)
        except FileNotFoundError:
            return None

    def _asked(self, call: Callable[[], Answer], name: str) -> Answer:
        if os.getpid() != self._process:
            # The library would wait for ever for threads that a fork leaves behind.
            raise UsageError(f"{self._uri} was opened before this process was forked, which its connections do not "
                             'survive; start workers with "spawn" (DataLoader(multiprocessing_context="spawn"))')

        def checked() -> Answer:
            try:
                return call()
            except FileNotFoundError as error:
                # The library reports a missing bucket like a missing object.
                if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                    raise BaseError(str(error)) from error
                raise

        answer = patiently(checked, f"{self._uri}/{name}".rstrip("/"), self._seconds)
        self._seconds = BUDGET_SECONDS
        return answer


def _opened(uri: str, retries: int) -> ObjectStore:
    if uri.startswith("memory:"):
        return _MEMORY.setdefault(uri, MemoryStore())
    if "?" in uri or "#" in uri or ("@" in uri and not uri.startswith("abfs")):
        raise UsageError("an address has no ?, # or @ in it; credentials and settings come from the environment")
    options: dict[str, Any] = {
        "client_options": {"timeout": _REQUEST_TIMEOUT, "allow_http": _allows_http(uri)},
        "retry_config": {"max_retries": retries, "retry_timeout": timedelta(minutes=4)}}
    if uri.startswith("s3:") and "AWS_CHECKSUM_ALGORITHM" not in os.environ:
        # The store then refuses a body that was changed on its way.
        options["config"] = {"aws_checksum_algorithm": "sha256"}
    return patiently(lambda: from_url(uri, **options), uri, 0)


def _allows_http(uri: str) -> bool:
    vendor = {"s": "AWS", "g": "GOOGLE"}.get(uri[0], "AZURE")
    return os.environ.get(f"{vendor}_ALLOW_HTTP", "").lower() in ("1", "true", "yes")
