"""Files that nothing refers to: what crashes and lost races leave in a dataset. Found by `gc`, deleted only when asked.

A crash between the sidecar and the main shard leaves the sidecar; a lost race leaves the loser's. Neither does harm but
for its bytes. Deleting is where other systems lose data, so the rule is narrow: what a shard refers to is read from the
main shards themselves and never from a summary or a cache; sidecars are listed before shards, so that a commit in
between is seen; and nothing young is touched, since a run may be about to refer to it. Only files whose names this
package makes are looked at. The trade-off: what a run left today stays until tomorrow.
"""

import re
import time
import uuid
from collections import defaultdict
from typing import Final

from msgspec import Struct

from distill_pipe.errors import DamageError, MismatchError
from distill_pipe.store.ahead import ahead
from distill_pipe.store.commit import HIDDEN, QUARANTINE, committed_shards
from distill_pipe.store.manifest import require_run, shard_name, sidecar_name
from distill_pipe.store.root import SCRATCH, Entry, Root
from distill_pipe.store.shard import read_shard_info

GRACE_SECONDS: Final = 24 * 3600.0
_SIDECAR = re.compile(r".*/shard-(\d+)-([0-9a-f]{8})\.parquet")
_PLAN_PART = re.compile(r"plan/part-\d+-[0-9a-f]{8}\.parquet")
_CUT_OFF = ("an upload that was cut off in the middle is kept by the store and seen by nobody; give the bucket a rule "
            "that ends such uploads after two days (AbortIncompleteMultipartUpload)")


class Garbage(Struct, frozen=True, kw_only=True):
    """What `gc` found. `files` are referred to by nothing and older than the grace time; `young` counts those that are
    not yet; `unreadable` names shards whose record could not be read, and whose files were left alone therefore."""

    root: str
    deleted: bool
    files: tuple[str, ...]
    bytes: int
    young: int
    unreadable: tuple[str, ...]
    notes: tuple[str, ...]


def collect_garbage(root: Root, *, delete: bool = False, grace_seconds: float = GRACE_SECONDS) -> Garbage:
    """Find the orphans of a dataset, and delete them if `delete`.

    Raises:
        MismatchError: there is no dataset, or it is of another format version.
    """
    run = require_run(root)
    # In this order: what a run refers to after the first listing is seen in the second.
    scratch = list(root.entries(SCRATCH))
    sidecars = [entry for folder in (HIDDEN, QUARANTINE) for entry in root.entries(folder)]
    parts = [entry for entry in root.entries("plan") if _PLAN_PART.fullmatch(entry.name)]
    referenced, unreadable = _referenced(root, sidecars)
    planned = {ref.name for ref in run.plan}
    orphans = scratch + [e for e in parts if e.name not in planned] + [
        e for e in sidecars if _owner(e.name) is not None and e.name not in referenced]
    now = _store_clock(root) if delete else time.time()
    old = [entry for entry in orphans if now - entry.modified >= grace_seconds]
    if delete and old:
        # A run may have written one of them again meanwhile: the same content has the same name.
        unchanged = {entry for folder in (SCRATCH, HIDDEN, QUARANTINE, "plan") for entry in root.entries(folder)}
        old = [entry for entry in old if entry in unchanged]
        for entry in old:
            root.remove(entry.name)
    notes = (_CUT_OFF,) if "://" in str(root) else ()
    return Garbage(root=str(root), deleted=delete, files=tuple(e.name for e in old), bytes=sum(e.size for e in old),
                   young=len(orphans) - len(old), unreadable=tuple(unreadable), notes=notes)


def _referenced(root: Root, sidecars: list[Entry]) -> tuple[set[str], list[str]]:
    """The sidecars that committed shards refer to, and the shards that cannot be read; theirs all count as referred to.
    A shard with a single hidden-state sidecar is not opened: it is that one."""
    by_shard: dict[int, list[str]] = defaultdict(list)
    for entry in sidecars:
        shard = _owner(entry.name)
        if shard is not None:
            by_shard[shard].append(entry.name)
    referenced: set[str] = set()
    doubtful: list[int] = []
    for shard in sorted(by_shard.keys() & committed_shards(root)):
        if len(by_shard[shard]) == 1 and by_shard[shard][0].startswith(HIDDEN):
            referenced.update(by_shard[shard])
        else:
            doubtful.append(shard)
    unreadable = []
    for shard, names in zip(doubtful, ahead(lambda shard: _names_in_record(root, shard), doubtful), strict=True):
        if names is None:
            unreadable.append(shard_name(shard))
        referenced.update(by_shard[shard] if names is None else names)
    return referenced, unreadable


def _names_in_record(root: Root, shard: int) -> list[str] | None:
    try:
        with root.fetched(shard_name(shard)) as path:
            info = read_shard_info(path)
    except (DamageError, MismatchError):
        return None
    return [ref.name for ref in (info.hidden, info.quarantine) if ref is not None]


def _owner(name: str) -> int | None:
    """The shard that a sidecar's name says it belongs to; None for a name that is not one of ours."""
    found = _SIDECAR.fullmatch(name)
    if found is None:
        return None
    shard = int(found[1])
    return shard if name in (sidecar_name(folder, shard, found[2]) for folder in (HIDDEN, QUARANTINE)) else None


def _store_clock(root: Root) -> float:
    """The time by the clock that stamps the files, which need not be this machine's."""
    name = f"{SCRATCH}/clock-{uuid.uuid4().hex}"
    root.publish_bytes(b"", name)
    try:
        return next(entry.modified for entry in root.entries(SCRATCH) if entry.name == name)
    finally:
        root.remove(name)
