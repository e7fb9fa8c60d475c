"""Catches a shard that is committed twice, partly, over something else, or with the wrong prompts.

Processes are really killed and disks are really full; see `committer.py` for the process.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import stored_traces
from tiny_datasets import Shape, make_dataset, random_trace, start_run

from distill_pipe.errors import DamageError, MismatchError, StorageFullError
from distill_pipe.store import commit
from distill_pipe.store.commit import (
    adopt_shard,
    commit_shard,
    committed_flags,
    committed_shards,
    listed_shards,
    restore_fragments,
    shard_fragment,
)
from distill_pipe.store.hidden_codec import encode_trace
from distill_pipe.store.manifest import Fragment, Run, encode_record, fragment_name, read_fragment, shard_name
from distill_pipe.store.plan import num_shards, shard_range
from distill_pipe.store.root import SCRATCH, LocalRoot
from distill_pipe.store.shard import QuarantinedPrompt
from distill_pipe.store.sidecar import EncodedTrace
from distill_pipe.store.verify import verify

COMMITTER = [sys.executable, str(Path(__file__).with_name("committer.py"))]
KILLS = 20
PLAIN = Shape()


def shard_traces(run: Run, shard: int, shape: Shape = PLAIN, seed: int = 0) -> list[EncodedTrace]:
    codec = run.spec.capture.hidden_codec
    return [encode_trace(random_trace(o, shape, seed), codec) for o in range(*shard_range(run, shard))]


def given_up(ordinal: int) -> QuarantinedPrompt:
    return QuarantinedPrompt(ordinal, f"prompt-{ordinal}", "too_long", "it is too long")


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return start_run(tmp_path / "out", 10)


@pytest.fixture
def root(tmp_path: Path, run: Run) -> LocalRoot:
    return LocalRoot(tmp_path / "out")


def test_a_second_commit_adopts_the_first_and_changes_nothing(root: LocalRoot, run: Run) -> None:
    first = commit_shard(root, run, 1, shard_traces(run, 1), [])
    before = files(root.path)
    assert commit_shard(root, run, 1, shard_traces(run, 1), []) == first
    assert files(root.path) == before
    assert committed_shards(root) == {1}


def test_a_second_commit_with_other_values_loses_and_leaves_only_an_orphan_sidecar(root: LocalRoot, run: Run) -> None:
    first = commit_shard(root, run, 0, shard_traces(run, 0), [])
    before = files(root.path)
    assert commit_shard(root, run, 0, shard_traces(run, 0, seed=1), []) == first
    after = files(root.path)
    assert {name: after[name] for name in before} == before
    (extra,) = set(after) - set(before)
    assert verify(root).orphans == (extra,)


def test_traces_are_stored_in_ordinal_order_whatever_order_they_finish_in(root: LocalRoot, run: Run) -> None:
    commit_shard(root, run, 0, shard_traces(run, 0)[::-1], [])
    assert pq.read_table(root.local(shard_name(0)))["ordinal"].to_pylist() == [0, 1, 2, 3]
    for trace in stored_traces(root.path):
        assert trace.token_ids_T.tolist() == random_trace(trace.ordinal).token_ids_T.tolist()


def test_threads_racing_for_a_shard_make_one(root: LocalRoot, run: Run) -> None:
    for shard in range(num_shards(run)):
        barrier, won = threading.Barrier(4), []

        def attempt(seed: int, shard: int = shard, barrier: threading.Barrier = barrier,
                    won: list[Fragment] = won) -> None:
            traces = shard_traces(run, shard, seed=seed)
            barrier.wait()
            won.append(commit_shard(root, run, shard, traces, []))

        threads = [threading.Thread(target=attempt, args=[seed]) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 4
        assert won == [won[0]] * 4
        assert read_fragment(root, shard) == won[0]
    assert verify(root).clean


@pytest.mark.matrix
def test_processes_racing_for_every_shard_make_one_dataset(tmp_path: Path, fault_row) -> None:
    make_dataset(tmp_path / "donor", 24, Shape(prompts_per_shard=2))
    start_run(tmp_path / "out", 24, Shape(prompts_per_shard=2))
    racers = [subprocess.Popen([*COMMITTER, tmp_path / "donor", tmp_path / "out"], stdout=subprocess.DEVNULL)
              for _ in range(2)]
    assert [racer.wait(300) for racer in racers] == [0, 0]
    report = verify(LocalRoot(tmp_path / "out"))
    assert report.clean
    assert (report.shards_found, report.traces, report.orphans) == (12, 24, ())
    fault_row("F15 two processes race for every shard", 12, 12)


@pytest.mark.parametrize(("traced", "quarantined"), [
    ([0, 1, 2], []), ([0, 1, 2, 3, 4], []), ([0, 1, 2, 2], []), ([0, 1, 2, 4], []), ([0, 1, 2, 3], [3]), ([], []),
    ([0, 1], [2]), ([4, 5, 6, 7], []),
])
def test_prompts_that_are_not_exactly_the_shards_are_refused(root: LocalRoot, run: Run, traced: list[int],
                                                             quarantined: list[int]) -> None:
    before = files(root.path)
    with pytest.raises(MismatchError, match="not exactly those of its plan"):
        commit_shard(root, run, 0, [encode_trace(random_trace(o), run.spec.capture.hidden_codec) for o in traced],
                     [given_up(o) for o in quarantined])
    assert files(root.path) == before


@pytest.mark.parametrize("lost", [[1], [0, 3], [0, 1, 2, 3]])
def test_quarantined_prompts_are_kept_with_their_reason(root: LocalRoot, run: Run, lost: list[int]) -> None:
    traces = [t for t in shard_traces(run, 0) if t.trace.ordinal not in lost]
    info = commit_shard(root, run, 0, traces, [given_up(o) for o in lost]).info
    assert (info.traces, info.quarantined) == (4 - len(lost), len(lost))
    assert info.quarantine is not None
    rows = pq.read_table(root.local(info.quarantine.name)).to_pylist()
    assert [(r["ordinal"], r["code"], r["message"]) for r in rows] == [(o, "too_long", "it is too long") for o in lost]
    assert (info.hidden is None) == (len(lost) == 4)
    report = verify(root)
    assert (report.problems, report.orphans, report.quarantined) == ((), (), len(lost))


def other_runs_shard(path: Path) -> None:
    other = path.parent.with_name("other")
    make_dataset(other, 10, Shape(top_k=7))
    shutil.copy(other / shard_name(0), path)


def another_place_in_the_plan(path: Path) -> None:
    other = path.parent.with_name("other")
    make_dataset(other, 10)
    shutil.copy(other / shard_name(1), path)


def a_foreign_table(path: Path) -> None:
    pq.write_table(pa.table({"text": ["hello"]}), path)


def junk(path: Path) -> None:
    path.write_bytes(b"my thesis")


@pytest.mark.parametrize(("put", "error", "text"), [
    (other_runs_shard, MismatchError, "left untouched"), (another_place_in_the_plan, MismatchError, "left untouched"),
    (a_foreign_table, MismatchError, "was not written by distill-pipe"), (junk, DamageError, "cannot be read")])
def test_what_is_not_this_shard_is_refused_and_left_as_it_was(root: LocalRoot, run: Run, put, error, text) -> None:
    path = root.local(shard_name(0))
    path.parent.mkdir(parents=True)
    put(path)
    before = path.read_bytes()
    with pytest.raises(error, match=text):
        commit_shard(root, run, 0, shard_traces(run, 0), [])
    assert path.read_bytes() == before
    assert read_fragment(root, 0) is None
    with pytest.raises(error):
        adopt_shard(root, run, 0)


@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(), lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"{"),
    lambda path: path.write_bytes(path.read_bytes()[:-20]), lambda path: path.write_bytes(b"\xff" * 300),
    lambda path: shutil.copy(path.with_name("0000001.json"), path)])
def test_a_fragment_that_is_missing_or_wrong_is_rebuilt_from_the_shard(root: LocalRoot, run: Run, damage) -> None:
    made = [commit_shard(root, run, shard, shard_traces(run, shard), []) for shard in (0, 1)]
    path = root.local(fragment_name(0))
    damage(path)
    left = files(root.path)
    assert shard_fragment(root, run, 0) == made[0]
    assert files(root.path) == left, "shard_fragment must not write"
    assert adopt_shard(root, run, 0) == made[0]
    assert read_fragment(root, 0) == made[0]


def test_a_fragment_of_another_run_is_rebuilt_from_the_shard(root: LocalRoot, run: Run) -> None:
    made = commit_shard(root, run, 0, shard_traces(run, 0), [])
    other = msgspec.structs.replace(made, info=msgspec.structs.replace(made.info, fingerprint="f" * 64))
    root.local(fragment_name(0)).write_bytes(encode_record(other))
    assert adopt_shard(root, run, 0) == made
    assert read_fragment(root, 0) == made


def test_files_that_are_no_shards_are_not_taken_for_shards(root: LocalRoot, run: Run) -> None:
    commit_shard(root, run, 2, shard_traces(run, 2), [])
    folder = root.local(shard_name(2)).parent
    names = ["notes.txt", "table.parquet", "my-table.parquet", "shard-0000001.parquet.tmp", "shard-1.parquet",
             "shard-0000002 (copy).parquet", "shard-0001000.parquet",
             "shard-\u0660\u0660\u0660\u0660\u0660\u0660\u0661.parquet"]
    for name in names:
        (folder / name).touch()
    assert committed_shards(root) == {2}
    assert sorted(listed_shards(root)[1]) == sorted(f"data/train/0000/{name}" for name in names)


@pytest.mark.parametrize("writer", ["write_sidecar", "write_main"])
def test_a_file_that_was_not_written_as_it_should_be_is_not_committed(
        root: LocalRoot, run: Run, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    def spoil(path: Path, *rest: object) -> None:
        real(path, *rest)
        chunk = pq.read_metadata(path).row_group(0).column(0)
        data = bytearray(path.read_bytes())
        data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
        path.write_bytes(data)

    real, before = getattr(commit, writer), files(root.path)
    monkeypatch.setattr(commit, writer, spoil)
    with pytest.raises(DamageError, match="row group 0, column ordinal"):
        commit_shard(root, run, 0, shard_traces(run, 0), [])
    assert files(root.path) == before


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 1 MiB; not below `tmp_path`, which pytest moves away while another pytest is running."""
    path = Path(tempfile.mkdtemp(prefix="small-disk-"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        path.rmdir()
        pytest.skip(f"needs root to mount a small disk: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)
    path.rmdir()


@pytest.mark.matrix
def test_a_full_disk_leaves_nothing_of_a_shard_behind_however_little_room_there_was(small_disk, fault_row) -> None:
    shape = Shape(vocab_size=512, top_k=256, hidden_size=2000, layers=(1, 2), hidden_codec="f32")
    run, root = start_run(small_disk / "out", 4, shape), LocalRoot(small_disk / "out")
    ballast = small_disk / "ballast"
    refusals = 0
    for free in range(0, 1 << 20, 24 << 10):
        ballast.unlink(missing_ok=True)
        ballast.write_bytes(bytes(max(shutil.disk_usage(small_disk).free - free, 0)))
        before = files(root.path)
        try:
            commit_shard(root, run, 0, shard_traces(run, 0, shape), [])
        except StorageFullError as error:
            refusals += 1
            assert "No space left on device; free some room" in str(error)  # noqa: PT017 - success is fine too
            after = files(root.path)
            # The shard is committed when only the fragment found no room.
            assert after == before or shard_name(0) in after
            assert list((root.path / SCRATCH).glob("*")) == []
        if committed_shards(root):
            break
    ballast.unlink()
    adopt_shard(root, run, 0)
    report = verify(root)
    assert refusals > 5
    assert report.clean
    assert report.orphans == ()
    fault_row("F04 disk full in the middle of a shard, then freed", refusals, refusals)


@pytest.mark.matrix
def test_a_file_size_limit_ends_in_the_same_error_and_a_rerun_completes(tmp_path: Path, fault_row) -> None:
    make_dataset(tmp_path / "donor", 4, Shape(hidden_size=512))
    start_run(tmp_path / "out", 4, Shape(hidden_size=512))
    before = files(tmp_path / "out")
    line = [*COMMITTER, tmp_path / "donor", tmp_path / "out"]
    failed = subprocess.run([*line, "20000"], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("StorageFullError: ")
    assert files(tmp_path / "out") == before
    subprocess.run(line, check=True, capture_output=True)
    assert verify(LocalRoot(tmp_path / "out")).clean
    fault_row("F05 file size limit", 1, 1)


@pytest.mark.matrix
def test_a_dataset_whose_writer_is_killed_again_and_again_is_completed_by_a_rerun(tmp_path: Path, fault_row) -> None:
    shape = Shape(prompts_per_shard=1)
    make_dataset(tmp_path / "donor", 80, shape)
    run, root = start_run(tmp_path / "out", 80, shape), LocalRoot(tmp_path / "out")
    chance = random.Random(0)
    line = [*COMMITTER, tmp_path / "donor", root.path]
    progress = []
    with subprocess.Popen([*line, "--fork"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        for _ in range(KILLS):
            server.stdin.write("\n")
            server.stdin.flush()
            victim = int(server.stdout.readline())
            time.sleep(chance.uniform(0, 0.03))
            os.kill(victim, signal.SIGKILL)
            while server.stdout.readline() != "gone\n":
                pass
            progress.append(len(committed_shards(root)))
            if len(progress) % 5 == 0:
                report = verify(root)
                assert report.problems == ()
                assert (report.traces, report.missing_prompts) == (progress[-1], 80 - progress[-1])
    assert progress == sorted(progress)
    assert KILLS < progress[-1] < 80, "the kills must fall among the commits"
    subprocess.run(line, check=True, capture_output=True)
    report = verify(root)
    assert report.clean
    assert report.traces == 80
    for found, wanted in zip(stored_traces(root.path), stored_traces(tmp_path / "donor"), strict=True):
        assert found.ordinal == wanted.ordinal
        assert np.array_equal(found.topk_logprobs_N, wanted.topk_logprobs_N)
        assert all(np.array_equal(found.hidden[n], wanted.hidden[n]) for n in wanted.hidden)
    assert {read_fragment(root, shard) is not None for shard in range(num_shards(run))} == {True}
    fault_row("F01 writer killed at random moments", KILLS, KILLS)


def test_the_flags_of_a_run_are_those_of_its_own_shards(tmp_path: Path) -> None:
    run, root = make_dataset(tmp_path, 10), LocalRoot(tmp_path)
    root.remove(shard_name(1))
    for name in (shard_name(7), "data/train/0000/notes.txt", f"{shard_name(1)}.part"):
        root.publish_bytes(b"", name)
    assert list(committed_flags(root, run)) == [1, 0, 1]
    assert restore_fragments(root, run, (0, 2)) == 0
    root.remove(fragment_name(2))
    assert restore_fragments(root, run, (0, 2)) == 1
    assert read_fragment(root, 2) is not None
