"""A repository on the Hub -> a dataset.

Files are taken at one commit, checked against the Hub's hash before they get their name, and put in place in the order
in which a run would have: sidecars before the shard that needs them. So a pull that was stopped leaves a valid dataset
with fewer shards, and the same command fetches the rest. The trade-off: `generate` on such a dataset would make the
missing shards anew, since it cannot know that they exist elsewhere.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec
from msgspec import Struct

from distill_pipe.errors import DamageError, MismatchError, UsageError
from distill_pipe.hub.remote import Content, Repository, content_of
from distill_pipe.store.card import CARD
from distill_pipe.store.finalize import MANIFEST, STATISTICS, SUCCESS
from distill_pipe.store.manifest import RUN, Name, require_run
from distill_pipe.store.root import Root

# What belongs to a dataset, in the order in which it may appear. Anything else in a repository is not ours to fetch.
_ORDER: Final = (RUN, "plan/", "target/", "hidden_states/train/", "_quarantine/", "data/train/", "_manifest/",
                 "statistics/", MANIFEST, STATISTICS, CARD, SUCCESS)
_THREADS: Final = 4


class Pulled(Struct, frozen=True, kw_only=True):
    """What a pull did. `files` are those of the dataset, `fetched` those of them that were not there."""

    root: str
    revision: str
    files: int
    fetched: int
    bytes_fetched: int


def pull(repository: Repository, root: Root, *, revision: str | None,
         on_part: Callable[[str, int], None]) -> Pulled:
    """Fetch what `root` does not hold. `on_part` gets each part's name and how many of its files are fetched.

    Raises:
        StoreAccessError, StoreError: see `Repository`.
        UsageError: `root` holds something that is no dataset.
        MismatchError: the repository is no dataset, or `root` holds another run, or another shard of the same name.
        DamageError: a file did not arrive as the Hub describes it.
    """
    commit = repository.head(revision)
    files = {name: content for name, content in repository.files(commit).items() if _rank(name) is not None}
    if RUN not in files:
        raise MismatchError(f"{repository.name} is not a distill-pipe dataset: it has no {RUN}")
    if root.size(RUN) is None and not root.is_unused():
        raise UsageError(f"{root} is not empty and is not a distill-pipe dataset; choose another folder")
    fetcher = _Fetcher(root, repository, commit)
    fetched = bytes_fetched = 0
    for rank, part in enumerate(_ORDER):
        missing = {n: c for n, c in files.items() if _rank(n) == rank and not fetcher.holds(n, c)}
        if missing:
            on_part(part, len(missing))
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(fetcher.fetch, missing, missing.values()))
            fetched, bytes_fetched = fetched + len(missing), bytes_fetched + sum(c.size for c in missing.values())
        if part == RUN:
            require_run(root)
    return Pulled(root=str(root), revision=commit, files=len(files), fetched=fetched,
                  bytes_fetched=bytes_fetched)


class _Fetcher:
    """Fetches files of one commit into a root."""

    def __init__(self, root: Root, repository: Repository, commit: str) -> None:
        self._root, self._repository, self._commit = root, repository, commit

    def holds(self, name: str, content: Content) -> bool:
        """Whether a file is there. Files appear whole or not at all, so for shards their size is enough; the small
        ones that may differ at one size are read. A card is its owner's and stays."""
        size = self._root.size(name)
        if size != content.size:
            return name == CARD and size is not None
        if content.sha256 is not None and name.endswith(".parquet"):
            return True
        with self._root.fetched(name) as path:
            return content_of(path).is_same(content)

    def fetch(self, name: str, content: Content) -> None:
        """Put one file in place."""
        with self._root.scratch() as folder:
            path = self._repository.fetch(name, self._commit, folder)
            if not content_of(path).is_same(content):
                raise DamageError(f"{self._repository.name}: {name} did not arrive as the Hub describes it; pull again")
            if name != RUN and not name.startswith("data/"):
                self._root.publish(path, name)
            elif not self._root.create(path, name):
                raise MismatchError(f"{self._root} holds another {name}: it belongs to another run, or to another copy "
                                    "of this one that was continued by itself; pull into a new folder")


def _rank(name: str) -> int | None:
    """The place of a file in the order, or None when it does not belong to a dataset."""
    try:
        msgspec.convert(name, Name)
    except msgspec.ValidationError:
        return None
    return next((i for i, part in enumerate(_ORDER)
                 if name == part or (part.endswith("/") and name.startswith(part))), None)
