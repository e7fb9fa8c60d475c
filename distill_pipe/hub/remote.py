"""One dataset repository on the Hub, as push and pull need it. The one file that talks to huggingface_hub.

A commit whose answer was lost may have happened, and a commit that raced another may not have. Neither is guessed:
after a failure the repository's tree says what is there, and only what is missing is sent again. The price is one
listing per failure.
"""

import hashlib
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from distill_pipe.errors import DamageError, DistillPipeError, StoreAccessError, StoreError, UsageError
from distill_pipe.store.root import sha256_of

# Seconds before each further try: ten minutes in all, since rate limits are counted over five.
WAITS: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 180.0, 180.0)
# Timeouts, conflicts with another commit, and rate limits pass by themselves, as do failures of the server.
_PASSING: Final = (408, 409, 412, 425, 429)
# HTTPError of httpx or httpx2, whichever this version of huggingface_hub is built on; lost connections are of it too.
_HTTP: Final[tuple[type[BaseException], ...]] = tuple(
    kind for kind in HfHubHTTPError.__mro__ if kind.__module__.startswith("httpx"))
# The last two are what the client makes of failed uploads and downloads; the cause is one of the first.
_FAILURES: Final[tuple[type[BaseException], ...]] = (*_HTTP, RuntimeError, LocalEntryNotFoundError)
# Nobody is kept in the dark for longer than the waits before this one.
_TOLD_AT: Final = 2
_PREFIX: Final = "hf://datasets/"
_log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Content:
    """What tells one content from another: bytes and hashes. The Hub knows large files by their sha256 and small ones
    by git's hash of a blob; None where that hash is not at hand."""

    size: int
    sha256: str | None
    git_sha1: str | None

    def is_same(self, other: "Content") -> bool:
        """Whether a hash that both have is the same."""
        if self.size != other.size:
            return False
        if self.sha256 is not None and other.sha256 is not None:
            return self.sha256 == other.sha256
        return self.git_sha1 is not None and self.git_sha1 == other.git_sha1


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A file to send: its bytes, or where they lie, and what they should be."""

    data: bytes | Path
    content: Content


class Repository:
    """A dataset repository, `owner/name`.

    Raises:
        UsageError: the name is none.
    """

    def __init__(self, name: str) -> None:
        disable_progress_bars()
        self.name = name.removeprefix(_PREFIX)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", self.name) is None:
            raise UsageError(f"{name!r} is not a repository: write owner/name")
        self._api = HfApi(library_name="distill-pipe")

    def create(self, *, private: bool) -> None:
        """Make the repository unless it is there.

        Raises:
            UsageError: the Hub refuses the name.
            StoreAccessError: the Hub does not let this user write there.
        """
        self._tried(lambda: self._api.create_repo(self.name, repo_type="dataset", private=private, exist_ok=True))

    def head(self, revision: str | None = None) -> str:
        """The commit that a branch, a tag or the main branch is at; what is read at it stays the same.

        Raises:
            StoreAccessError: there is no such repository or revision, or it may not be read.
            StoreError: the Hub kept failing.
        """
        return str(self._tried(lambda: self._api.repo_info(self.name, repo_type="dataset", revision=revision)).sha)

    def files(self, revision: str | None = None) -> dict[str, Content]:
        """Every file by name. Raises as `head`."""
        return self._tried(lambda: self._listed(revision))

    def commit(self, files: Mapping[str, Outgoing], message: str) -> None:
        """Put files into the repository in one commit; what is uploaded already is not uploaded again.

        Raises:
            DamageError: a file is not what its record says.
            StoreAccessError: the Hub does not let this user write there.
            StoreError: the Hub kept failing; the same call goes on where this one stopped.
        """
        unsure = False

        def attempt() -> None:
            nonlocal unsure
            held = self._listed(None) if unsure else {}
            unsure = True
            additions = [_addition(name, file) for name, file in files.items()
                         if name not in held or not held[name].is_same(file.content)]
            if additions:
                self._api.create_commit(self.name, additions, repo_type="dataset", commit_message=message)

        self._tried(attempt)

    def fetch(self, name: str, revision: str, folder: Path) -> Path:
        """Download a file below a local folder; its content is for the caller to check. Raises as `head`."""
        return Path(self._tried(lambda: self._api.hf_hub_download(
            self.name, name, repo_type="dataset", revision=revision, local_dir=folder)))

    def _listed(self, revision: str | None) -> dict[str, Content]:
        tree = self._api.list_repo_tree(self.name, repo_type="dataset", revision=revision, recursive=True)
        return {entry.path: Content(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
                for entry in tree if isinstance(entry, RepoFile)}

    def _tried(self, ask: Callable[[], Answer]) -> Answer:
        """The answer, after as many tries as it takes; failures that will not pass are raised at once."""
        for tried, wait in enumerate((*WAITS, None)):
            try:
                return ask()
            except HFValidationError as error:
                raise UsageError(f"{self.name!r} is not a repository: write owner/name") from error
            except _FAILURES as error:
                failure = error if isinstance(error, _HTTP) else error.__cause__
                if not isinstance(failure, _HTTP):
                    raise
                status = failure.response.status_code if isinstance(failure, HfHubHTTPError) else None
                if wait is None or not (status is None or status in _PASSING or status >= 500):
                    raise self._plain(failure, status) from error
                if tried == _TOLD_AT:
                    _log.warning("%s: %s; trying again for up to %.0f s", self.name, _said(failure), sum(WAITS[tried:]))
            except ValueError as error:
                raise UsageError(f"{self.name}: {' '.join(str(error).split())}") from error
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _plain(self, failure: BaseException, status: int | None) -> DistillPipeError:
        said = _said(failure)
        # A repository that this user may not see is said not to be there.
        if status in (401, 403, 404):
            return StoreAccessError(f"{self.name}: {said} Check the name; then log in with `hf auth login`, or set "
                                    "HF_TOKEN to a token that may do this")
        if status is not None and status < 500 and status not in _PASSING:
            return UsageError(f"{self.name}: the Hub refused: {said}")
        return StoreError(f"{self.name}: the Hub kept failing: {said}; the same command goes on where this one stopped")


def _said(failure: BaseException) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0]


def content_of(path: Path) -> Content:
    """A local file's content, by both hashes."""
    size = path.stat().st_size
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            sha1.update(block)
    return Content(size, sha256.hexdigest(), sha1.hexdigest())


def content_of_bytes(data: bytes) -> Content:
    """The content of bytes in memory, by both hashes."""
    sha1 = hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False)
    return Content(len(data), hashlib.sha256(data).hexdigest(), sha1.hexdigest())


def _addition(name: str, file: Outgoing) -> CommitOperationAdd:
    if isinstance(file.data, Path) and sha256_of(file.data) != file.content.sha256:
        raise DamageError(f"{file.data} has changed: its sha256 is not the one recorded; run `distill-pipe verify`")
    return CommitOperationAdd(name, file.data)

