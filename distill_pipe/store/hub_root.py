"""A finished dataset on the Hugging Face Hub: `hf://datasets/owner/name`, `@revision` if wanted. Read only.

The revision is resolved to a commit once, so that all reads are of one state. Files go through the client's own cache
(HF_HOME), where they stay: the trade-off is room on the local disk, and a second epoch downloads nothing. The client
tries again by itself and reads the token of its own login. `push` uploads a dataset; nothing here writes.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

from distill_pipe.errors import DamageError, StoreAccessError, StoreError, UsageError
from distill_pipe.store.disk import storage_failures
from distill_pipe.store.root import MAX_RECORD_BYTES, Entry, require_inside

_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w./-]+))?/?")


class HubRoot:
    """A dataset repository at one commit."""

    def __init__(self, uri: str) -> None:
        found = _ADDRESS.fullmatch(uri)
        if found is None:
            raise UsageError(f"{uri}: write hf://datasets/owner/name, or hf://datasets/owner/name@revision")
        try:
            from huggingface_hub import HfApi
        except ImportError:
            raise UsageError(f"{uri} needs huggingface-hub: pip install huggingface-hub") from None
        self._uri, self._repo, self._api = uri.rstrip("/"), found[1], HfApi()
        with _hub_failures(uri):
            self._commit = str(self._api.dataset_info(self._repo, revision=found[2], timeout=30).sha)

    def __str__(self) -> str:
        return self._uri

    def read(self, name: str) -> bytes | None:
        """The whole of a small file, or None when there is none.

        Raises:
            DamageError: it is larger than any record of ours.
        """
        size = self.size(name)
        if size is None:
            return None
        if size > MAX_RECORD_BYTES:
            raise DamageError(f"{self._uri}/{name} has more than {MAX_RECORD_BYTES} bytes; no record is that large")
        with self.fetched(name, size) as path:
            return path.read_bytes()

    def size(self, name: str) -> int | None:
        """Bytes of the file, or None when there is none."""
        with _hub_failures(f"{self._uri}/{name}"):
            found = self._api.get_paths_info(self._repo, [require_inside(name)], repo_type="dataset",
                                             revision=self._commit)
        return next((int(info.size) for info in found if hasattr(info, "size")), None)

    def names(self, prefix: str) -> Iterator[str]:
        """Every file name below the folder `prefix`."""
        return (entry.name for entry in self.entries(prefix))

    def entries(self, prefix: str) -> Iterator[Entry]:
        """`names` with sizes. The Hub tells no times without a request per file, so all are 0."""
        from huggingface_hub.errors import EntryNotFoundError

        with _hub_failures(f"{self._uri}/{prefix}"):
            try:
                for info in self._api.list_repo_tree(self._repo, require_inside(prefix), recursive=True,
                                                     repo_type="dataset", revision=self._commit):
                    if hasattr(info, "size"):
                        yield Entry(info.path, int(info.size), 0.0)
            except EntryNotFoundError:
                return

    @contextmanager
    def fetched(self, name: str, size: int | None = None) -> Iterator[Path]:
        """The file in the client's cache.

        Raises:
            DamageError: there is none, or it has not `size` bytes.
        """
        held = self.size(name)
        if held is None:
            raise DamageError(f"{self._uri}/{name} is missing")
        if size is not None and held != size:
            raise DamageError(f"{self._uri}/{name} has {held} bytes, expected {size}")
        with _hub_failures(f"{self._uri}/{name}"):
            path = self._api.hf_hub_download(self._repo, name, repo_type="dataset", revision=self._commit)
        yield Path(path)

    @contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO]:
        """The file in the client's cache."""
        with self.fetched(name) as path, open(path, "rb") as file:
            yield file

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A private local folder, gone afterwards whatever happens."""
        with storage_failures(f"{tempfile.gettempdir()} (TMPDIR)"):
            folder = Path(tempfile.mkdtemp(prefix="distill-pipe-"))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def publish(self, source: Path, name: str) -> None:  # noqa: ARG002
        """Refused."""
        self._refuse(name)

    def create(self, source: Path, name: str) -> bool:  # noqa: ARG002
        """Refused."""
        self._refuse(name)

    def create_bytes(self, data: bytes, name: str) -> bool:  # noqa: ARG002
        """Refused."""
        self._refuse(name)

    def publish_bytes(self, data: bytes, name: str) -> None:  # noqa: ARG002
        """Refused."""
        self._refuse(name)

    def remove(self, name: str) -> None:
        """Refused."""
        self._refuse(name)

    def free_bytes(self) -> int | None:
        """Nobody knows."""
        return None

    def is_unused(self) -> bool:
        """Never: a dataset is not made here."""
        return False

    def _refuse(self, name: str) -> NoReturn:
        raise UsageError(f"{self._uri}/{name} is not written: a dataset on the Hub can only be read; make it in a "
                         "folder or an object store, then upload it")


@contextmanager
def _hub_failures(where: str) -> Iterator[None]:
    """What the client raises, as errors of ours."""
    # HTTPError is that of the HTTP client below, whose name has changed twice.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except RevisionNotFoundError:
        raise UsageError(f"{where}: there is no such revision") from None
    except (GatedRepoError, RepositoryNotFoundError):
        raise StoreAccessError(f"{where}: there is no such dataset, or your login may not read it; see `hf auth "
                               "login`") from None
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StoreError(f"{where}: the Hub could not be asked: {reason}") from error
