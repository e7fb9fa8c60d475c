"""F42, F43: `gc` on every kind of root.

Catches a live file that is deleted: the sidecar of a committed shard, of one that is being committed, or of one whose
record cannot be read; and an orphan that is never found.
"""

import os
import threading
import uuid
from pathlib import Path

import pytest
from tiny_datasets import Shape, make_dataset, random_trace, start_run

from distill_pipe.store import orphans
from distill_pipe.store.commit import HIDDEN, QUARANTINE, commit_shard, committed_shards
from distill_pipe.store.hidden_codec import encode_trace
from distill_pipe.store.manifest import Run, fragment_name, read_fragment, shard_name, sidecar_name
from distill_pipe.store.orphans import collect_garbage
from distill_pipe.store.plan import num_shards, shard_range
from distill_pipe.store.root import LocalRoot, Root, open_root
from distill_pipe.store.shard import QuarantinedPrompt
from distill_pipe.store.verify import verify

PROMPTS, DAY = 10, 24 * 3600


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    place = str(tmp_path / "root") if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    make_dataset(place, PROMPTS)
    return open_root(place)


def orphan(folder: str = HIDDEN, shard: int = 1, digest: str = "0" * 64) -> str:
    return sidecar_name(folder, shard, digest)


def all_names(root: Root) -> set[str]:
    return {name for folder in ("data", "hidden_states", "_quarantine", "_manifest", "plan", ".tmp")
            for name in root.names(folder)}


def test_a_whole_dataset_has_no_garbage(root: Root) -> None:
    before = all_names(root)
    found = collect_garbage(root, delete=True, grace_seconds=0)
    assert (found.files, found.young, found.unreadable, found.bytes) == ((), 0, (), 0)
    assert all_names(root) == before


@pytest.mark.parametrize("name", [orphan(), orphan(QUARANTINE), orphan(shard=77), "plan/part-000-00000000.parquet",
                                  ".tmp/0123/part"])
def test_an_orphan_is_listed_and_deleted_only_when_asked(root: Root, name: str) -> None:
    root.publish_bytes(b"12345", name)
    listed = collect_garbage(root, grace_seconds=0)
    assert (listed.files, listed.bytes, listed.deleted) == ((name,), 5, False)
    assert root.size(name) == 5
    deleted = collect_garbage(root, delete=True, grace_seconds=0)
    assert (deleted.files, deleted.deleted) == ((name,), True)
    assert root.size(name) is None
    report = verify(root)
    assert report.clean, report
    assert report.orphans == ()


@pytest.mark.parametrize("name", [orphan(), ".tmp/0123/part"])
def test_what_is_young_is_left_alone(root: Root, name: str) -> None:
    root.publish_bytes(b"12345", name)
    found = collect_garbage(root, delete=True)
    assert (found.files, found.young) == ((), 1)
    assert root.size(name) == 5


def test_age_is_told_by_the_clock_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F42: this machine's clock is a week ahead."""
    import time

    make_dataset(tmp_path, PROMPTS)
    root, now = LocalRoot(tmp_path), time.time()
    root.publish_bytes(b"1", orphan())
    monkeypatch.setattr(time, "time", lambda: now + 7 * DAY)
    assert collect_garbage(root, delete=True).files == ()
    os.utime(root.local(orphan()), (now - 2 * DAY, now - 2 * DAY))
    assert collect_garbage(root, delete=True).files == (orphan(),)


@pytest.mark.parametrize("name", ["hidden_states/train/notes.txt", "hidden_states/train/0000/shard-0000001.parquet",
                                  "hidden_states/train/0009/shard-0000001-00000000.parquet", "plan/mine.parquet",
                                  "data/train/0000/stranger.parquet", "_quarantine/0000/shard-1-00000000.parquet"])
def test_names_that_this_package_does_not_make_are_left_alone(root: Root, name: str) -> None:
    root.publish_bytes(b"12345", name)
    assert collect_garbage(root, delete=True, grace_seconds=0).files == ()
    assert root.size(name) == 5


def test_nothing_of_a_shard_whose_record_cannot_be_read_is_deleted(root: Root) -> None:
    root.publish_bytes(b"12345", orphan())
    root.publish_bytes(b"no parquet", shard_name(1))
    found = collect_garbage(root, delete=True, grace_seconds=0)
    assert (found.files, found.unreadable) == ((), (shard_name(1),))
    assert root.size(orphan()) == 5


def test_an_orphan_that_is_written_again_while_gc_looks_is_left_alone(tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was started again makes the same sidecar, under the same name, and is about to refer to it."""
    make_dataset(tmp_path, PROMPTS)
    root, look = LocalRoot(tmp_path), orphans._referenced
    for name in (orphan(shard=1), orphan(shard=2)):
        root.publish_bytes(b"12345", name)
        os.utime(root.local(name), (0, 0))

    def meanwhile(*args: object) -> object:
        root.publish_bytes(b"12345", orphan(shard=1))
        return look(*args)

    monkeypatch.setattr(orphans, "_referenced", meanwhile)
    assert collect_garbage(root, delete=True).files == (orphan(shard=2),)
    assert root.size(orphan(shard=1)) == 5


def test_a_fragment_and_a_summary_are_not_believed(root: Root) -> None:
    """F43: a stale record points at the orphan; the shard itself points at the live sidecar."""
    fragment = read_fragment(root, 1)
    assert fragment is not None
    assert fragment.info.hidden is not None
    stale = fragment.file.name.encode()
    data = root.read(fragment_name(1))
    assert data is not None
    assert stale in data
    root.publish_bytes(b"12345", orphan())
    root.publish_bytes(data.replace(fragment.info.hidden.name.encode(), orphan().encode()), fragment_name(1))
    assert collect_garbage(root, delete=True, grace_seconds=0).files == (orphan(),)
    assert root.size(fragment.info.hidden.name) is not None


def test_a_quarantine_file_of_an_attempt_that_lost_is_an_orphan_and_that_of_the_winner_is_not(tmp_path: Path) -> None:
    run, root = start_run(tmp_path, 4), LocalRoot(tmp_path)
    traces = [encode_trace(random_trace(o), run.spec.capture.hidden_codec) for o in range(3)]
    info = commit_shard(root, run, 0, traces, [QuarantinedPrompt(3, "p", "engine", "no")]).info
    root.publish_bytes(b"1", orphan(QUARANTINE, 0))
    assert collect_garbage(root, delete=True, grace_seconds=0).files == (orphan(QUARANTINE, 0),)
    assert info.quarantine is not None
    assert root.size(info.quarantine.name) == info.quarantine.size


@pytest.mark.matrix
def test_f43_gc_while_a_run_is_writing_takes_nothing_of_it(tmp_path: Path, fault_row) -> None:
    """Grace aside, the one thing that may be taken for an orphan is a sidecar whose shard was not committed yet."""
    run = start_run(tmp_path, 120, Shape(prompts_per_shard=2))
    root, finished = LocalRoot(tmp_path), threading.Event()

    def write(run: Run) -> None:
        for shard in range(num_shards(run)):
            held = [encode_trace(random_trace(o), "bf16-split") for o in range(*shard_range(run, shard))]
            commit_shard(root, run, shard, held, [])
        finished.set()

    writer = threading.Thread(target=write, args=(run,))
    writer.start()
    rounds = 0
    while not finished.is_set():
        before = committed_shards(root)
        listed = [name for name in collect_garbage(root, grace_seconds=0).files if name.startswith(HIDDEN)]
        assert not {int(name.split("-")[1]) for name in listed} & before
        assert collect_garbage(root, delete=True, grace_seconds=60).files == ()
        rounds += 1
    writer.join()
    report = verify(root)
    assert report.clean, report
    fault_row("F43 gc while a run writes", rounds, rounds)
