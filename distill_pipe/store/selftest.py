"""Does a store keep the promises that a dataset rests on? Tried out on the user's own store, in less than a minute; and
the one promise that no run may start without.

Everything happens below `.tmp/selftest-...` of the place that is tested, and is removed afterwards. A store that passes
today can still fail under load; what fails here will lose data sooner or later.
"""

import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

from msgspec import Struct

from distill_pipe.errors import DistillPipeError, UsageError
from distill_pipe.store.disk import open_to_all
from distill_pipe.store.root import SCRATCH, LocalRoot, Root

_RACES, _RACERS = 10, 4
_LARGE_BYTES: Final = 32 << 20


class Probe(Struct, frozen=True, kw_only=True):
    """One thing that was tried. `needed` says whether a dataset depends on it."""

    name: str
    passed: bool
    needed: bool
    detail: str
    seconds: float


class SelfTest(Struct, frozen=True, kw_only=True):
    """All that was tried on a place."""

    root: str
    probes: tuple[Probe, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(probe.name for probe in self.probes if probe.needed and not probe.passed)


def selftest(root: Root) -> SelfTest:
    """Try a place out.

    Raises:
        UsageError, StoreAccessError, StoreError: it cannot be reached at all.
        OSError: nothing can be written there.
    """
    folder = f"{SCRATCH}/selftest-{uuid.uuid4().hex}"
    # The first requests tell a wrong address or key from a store that breaks its promises.
    root.size(f"{folder}/none")
    root.publish_bytes(b"1", f"{folder}/first")
    tried: list[tuple[str, bool, Callable[[Root, str], str | None]]] = [
        ("what was written is read back", True, _reads_back),
        ("create refuses what is there", True, _creates_once),
        (f"of {_RACERS} creates at once one wins", True, _has_one_winner),
        ("a listing holds what was just written", True, _lists_at_once),
        ("what was written over is not seen again", True, _forgets_the_old),
        ("what was removed is gone", True, _removes),
        ("strangers cannot change what is written", True, _keeps_strangers_out),
        ("throughput", False, _throughput),
        ("room", False, _room)]
    if isinstance(root, LocalRoot):
        tried += [("hard links", False, partial(_hard_links, root.path)), ("a synced file", False, _sync_time)]
    try:
        return SelfTest(root=str(root), probes=tuple(_tried(root, folder, *probe) for probe in tried))
    finally:
        for name in list(root.names(folder)):
            root.remove(name)


def require_exclusive_create(root: Root) -> None:
    """Try out the one thing that commits rest on: what is there is not written over.

    Raises:
        UsageError: this place does it, so that two workers could replace each other's shards.
    """
    name = f"{SCRATCH}/probe-{uuid.uuid4().hex}"
    try:
        if not root.create_bytes(b"first", name) or root.create_bytes(b"other", name) or root.read(name) != b"first":
            raise UsageError(f"{root}: this store ignores the condition to write only where nothing is "
                             "(If-None-Match), so workers could replace each other's shards; use another store, or a "
                             "bucket without versioning")
    finally:
        root.remove(name)


def _tried(root: Root, folder: str, name: str, needed: bool, probe: Callable[[Root, str], str | None]) -> Probe:
    started = time.monotonic()
    try:
        detail, passed = probe(root, folder) or "", True
    except _FailedError as failure:
        detail, passed = str(failure), False
    except (DistillPipeError, OSError) as error:
        detail, passed = f"{type(error).__name__}: {error}", False
    return Probe(name=name, passed=passed, needed=needed, detail=detail, seconds=time.monotonic() - started)


class _FailedError(Exception):
    """A promise was broken; the message says how."""


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _FailedError(otherwise)


def _reads_back(root: Root, folder: str) -> None:
    data = os.urandom(1 << 16)
    root.publish_bytes(data, f"{folder}/back")
    _require(root.read(f"{folder}/back") == data, "other bytes came back")
    _require(root.size(f"{folder}/back") == len(data), "the size is another one")


def _creates_once(root: Root, folder: str) -> None:
    _require(root.create_bytes(b"first", f"{folder}/once"), "the first create was refused")
    _require(not root.create_bytes(b"other", f"{folder}/once"), "a second create went through")
    _require(root.read(f"{folder}/once") == b"first", "a second create changed what was there")


def _has_one_winner(root: Root, folder: str) -> str:
    for i in range(_RACES):
        start = threading.Barrier(_RACERS)

        def race(racer: int, name: str = f"{folder}/race-{i}", start: threading.Barrier = start) -> bool:
            start.wait()
            return root.create_bytes(b"%d" % racer, name)

        with ThreadPoolExecutor(_RACERS) as racers:
            won = [racer for racer, made in enumerate(racers.map(race, range(_RACERS))) if made]
        _require(len(won) == 1, f"{len(won)} of {_RACERS} won in round {i + 1}")
        _require(root.read(f"{folder}/race-{i}") == b"%d" % won[0], "the winner's bytes are not there")
    return f"{_RACES} rounds"


def _lists_at_once(root: Root, folder: str) -> None:
    for i in range(5):
        root.publish_bytes(b"1", f"{folder}/list/{i}")
        _require(sum(1 for _ in root.names(f"{folder}/list")) == i + 1, "the listing lags behind")


def _forgets_the_old(root: Root, folder: str) -> None:
    for i in range(5):
        root.publish_bytes(b"%d" % i, f"{folder}/over")
        _require(root.read(f"{folder}/over") == b"%d" % i, "an old version was read")


def _removes(root: Root, folder: str) -> None:
    root.publish_bytes(b"1", f"{folder}/gone")
    root.remove(f"{folder}/gone")
    _require(root.read(f"{folder}/gone") is None, "it can still be read")


def _keeps_strangers_out(root: Root, folder: str) -> None:  # noqa: ARG001 - as the others
    with root.scratch() as scratch:
        found = open_to_all(scratch)
    _require(found is None, f"every user of this machine may replace what is in {found}: chmod o-w it (or +t), or "
                            "choose another place (TMPDIR, where the dataset is in an object store)")


def _throughput(root: Root, folder: str) -> str:
    with root.scratch() as scratch:
        (scratch / "large").write_bytes(os.urandom(_LARGE_BYTES))
        started = time.monotonic()
        root.publish(scratch / "large", f"{folder}/large")
    written = time.monotonic()
    with root.fetched(f"{folder}/large", _LARGE_BYTES) as path:
        path.read_bytes()
    read = time.monotonic()
    return (f"{_LARGE_BYTES / 1e6 / (written - started):,.0f} MB/s written, "
            f"{_LARGE_BYTES / 1e6 / (read - written):,.0f} MB/s read")


def _room(root: Root, folder: str) -> str:  # noqa: ARG001 - as the others
    free = root.free_bytes()
    return "not known" if free is None else f"{free / 1e9:,.1f} GB free"


def _hard_links(path: Path, _: Root, folder: str) -> str:
    try:
        os.link(path / folder / "back", path / folder / "linked")
    except OSError as error:
        raise _FailedError(f"{error.strerror}: commits look, then rename, which holds less well when a worker is "
                           "stopped in between for longer than ten seconds") from None
    return "commits are one step"


def _sync_time(root: Root, folder: str) -> str:
    started = time.monotonic()
    for i in range(5):
        root.publish_bytes(b"1", f"{folder}/sync-{i}")
    return f"{(time.monotonic() - started) / 5 * 1e3:,.1f} ms each"
