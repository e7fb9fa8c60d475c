"""A dataset -> a repository on the Hub.

    run.json, plan, card                        first, so that what follows can be read at any time
    shards with their companions and records    a hundred in a commit
    manifest, statistics, _SUCCESS              last, once the dataset is complete

Only files that belong to the dataset are sent, and only those that the repository does not hold yet. A shard that is
there with other content is never replaced. The trade-off: what the repository has beside these files is left alone.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from msgspec import Struct

from distill_pipe.errors import MismatchError
from distill_pipe.hub.card import hub_card
from distill_pipe.hub.remote import Content, Outgoing, Repository, content_of, content_of_bytes
from distill_pipe.store.ahead import ahead
from distill_pipe.store.card import CARD
from distill_pipe.store.commit import committed_shards, shard_fragment
from distill_pipe.store.finalize import MANIFEST, STATISTICS, SUCCESS, TOKENS, finalize
from distill_pipe.store.manifest import (
    FINAL_NORM,
    RUN,
    FileRef,
    Fragment,
    Run,
    encode_record,
    fragment_name,
    require_run,
)
from distill_pipe.store.root import Root
from distill_pipe.store.statistics import token_table_name

# A commit takes the Hub a second or more however small it is, and a failed one is sent again whole.
SHARDS_PER_COMMIT = 100


class Pushed(Struct, frozen=True, kw_only=True):
    """What a push did. `files` are those of the dataset, `sent` those of them that the repository did not hold."""

    repository: str
    complete: bool
    files: int
    sent: int
    bytes_sent: int
    commits: int


@dataclass(frozen=True, slots=True)
class _Planned:
    """A file of the dataset. `data` is what it holds where it is not read from the dataset."""

    name: str
    content: Content
    data: bytes | None = None


def push(root: Root, repository: Repository, *, private: bool, on_commit: Callable[[int, int], None]) -> Pushed:
    """Send what the repository does not hold. `on_commit` gets how many shards are there, of how many.

    Raises:
        MismatchError: there is no dataset, or the repository holds another run, or another shard of the same name.
        DamageError: a file is not what its record says.
        StoreAccessError, StoreError: see `Repository`.
    """
    run = require_run(root)
    shards = sorted(committed_shards(root))
    complete = len(shards) == run.spec.num_shards
    if complete and root.size(SUCCESS) is None:
        finalize(root)
    fragments = list(ahead(lambda shard: shard_fragment(root, run, shard), shards))
    repository.create(private=private)
    sender = _Sender(root, repository, repository.files())
    sender.send(_frame(root, run, fragments, repository.name), "distill-pipe: run, plan and card")
    for first in range(0, len(fragments), SHARDS_PER_COMMIT):
        batch = fragments[first:first + SHARDS_PER_COMMIT]
        sender.send([file for fragment in batch for file in _of_shard(root, fragment)],
                    f"distill-pipe: shards {batch[0].info.shard} to {batch[-1].info.shard}")
        on_commit(first + len(batch), len(fragments))
    if complete:
        sender.send(_hashed(root, (TOKENS, MANIFEST, STATISTICS, SUCCESS)), "distill-pipe: the dataset is complete")
    return Pushed(repository=repository.name, complete=complete, files=sender.files, sent=sender.sent,
                  bytes_sent=sender.bytes_sent, commits=sender.commits)


class _Sender:
    """Sends what is not there, and counts."""

    def __init__(self, root: Root, repository: Repository, held: dict[str, Content]) -> None:
        self._root, self._repository, self._held = root, repository, held
        self.files = self.sent = self.bytes_sent = self.commits = 0

    def send(self, files: list[_Planned], message: str) -> None:
        """Send those files, in one commit, that the repository does not hold."""
        missing = [f for f in files if f.name not in self._held or not f.content.is_same(self._held[f.name])]
        self.files += len(files)
        for file in missing:
            if file.name in self._held and (file.name == RUN or file.name.startswith("data/")):
                raise MismatchError(f"{self._repository.name} holds another {file.name}: it belongs to another run, or "
                                    "to another copy of this one that was continued by itself; use a new repository")
        if not missing:
            return
        with ExitStack() as stack:
            self._repository.commit({f.name: Outgoing(
                stack.enter_context(self._root.fetched(f.name)) if f.data is None else f.data, f.content)
                for f in missing}, message)
        self.sent += len(missing)
        self.bytes_sent += sum(f.content.size for f in missing)
        self.commits += 1


def _frame(root: Root, run: Run, fragments: list[Fragment], repository: str) -> list[_Planned]:
    """What a dataset has beside its shards while it grows. run.json comes first: it says whose repository this is."""
    return [*_hashed(root, (RUN,)), *map(_recorded, run.plan), *_hashed(root, (FINAL_NORM,)),
            _held_in_memory(CARD, hub_card(root, run, fragments, repository))]


def _of_shard(root: Root, fragment: Fragment) -> list[_Planned]:
    info, name = fragment.info, fragment_name(fragment.info.shard)
    refs = [ref for ref in (info.hidden, info.quarantine, fragment.file) if ref is not None]
    return [*map(_recorded, refs), _held_in_memory(name, encode_record(fragment)),
            *_hashed(root, (token_table_name(name),))]


def _recorded(ref: FileRef) -> _Planned:
    return _Planned(ref.name, Content(ref.size, ref.sha256, None))


def _held_in_memory(name: str, data: bytes) -> _Planned:
    return _Planned(name, content_of_bytes(data), data)


def _hashed(root: Root, names: Iterable[str]) -> list[_Planned]:
    """Small files that no record holds the hash of; those that are not there are left out."""
    found = []
    for name in names:
        if root.size(name) is not None:
            with root.fetched(name) as path:
                found.append(_Planned(name, content_of(path)))
    return found
