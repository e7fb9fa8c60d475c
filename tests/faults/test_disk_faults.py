"""F01 to F03, F44, F50: every system call of a commit on the local disk fails once, or is the last.

Catches a shard that is taken for whole and is not, a name that exists before its bytes last, an error that is
swallowed, scratch that stays behind, and a traceback in place of a message. `make test` does every 17th call, `make
faults` all.
"""

import itertools
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_datasets import Shape, make_dataset, start_run

from distill_pipe.store.finalize import MANIFEST, STATISTICS, SUCCESS, TOKENS
from distill_pipe.store.root import SCRATCH, LocalRoot
from distill_pipe.store.verify import verify
from faults.attempts import FINALIZE, UNEXPECTED, Attempts
from faults.strace import Point, injected, points, require_strace, traced

PROMPTS = 4
SHAPE = Shape(prompts_per_shard=4)
KINDS = {"F01 killed": "signal=SIGKILL", "F02 ENOSPC": "error=ENOSPC", "F03 EIO": "error=EIO"}


@pytest.fixture
def attempts(tmp_path: Path) -> Iterator[Attempts]:
    make_dataset(tmp_path / "donor", PROMPTS, SHAPE)
    with Attempts(tmp_path / "donor") as started:
        require_strace(started, fresh_root(tmp_path), tmp_path)
        yield started


def fresh_root(tmp_path: Path) -> Path:
    """A frozen run without shards, always at the same place, so that calls can be told by it."""
    path = tmp_path / "out"
    shutil.rmtree(path, ignore_errors=True)
    start_run(path, PROMPTS, SHAPE)
    return path


def assert_survives(attempts: Attempts, tmp_path: Path, point: Point, kind: str) -> float:
    """Whatever the point, a reader sees no shard or a whole one, and the next attempt makes the dataset whole. Returns
    how many seconds that took."""
    path = fresh_root(tmp_path)
    code = injected(attempts, path, point, KINDS[kind])
    if kind == "F01 killed":
        assert code == -signal.SIGKILL, point
    else:
        assert code != UNEXPECTED, point
        # Scratch that could not be removed is the one thing that may stay.
        tidied = point.call not in ("unlink", "unlinkat", "rmdir", "openat")
        assert not (tidied and list(LocalRoot(path).names(SCRATCH))), point
    started = time.monotonic()
    report = verify(LocalRoot(path))
    assert report.problems == (), (point, report)
    assert report.traces in (0, PROMPTS), (point, report)
    assert report.traces == PROMPTS or code != 0, (point, "counted as done")
    assert attempts.run(path) == 0, point
    report = verify(LocalRoot(path))
    assert report.clean, (point, report)
    assert report.traces == PROMPTS, point
    return time.monotonic() - started


def fail_every_call(attempts: Attempts, tmp_path: Path, kind: str, step: int) -> tuple[int, float]:
    """How many calls were failed, and the longest recovery."""
    found = points(attempts, fresh_root(tmp_path), tmp_path)
    assert {"fsync", "rename", "write"} <= {point.call for point in found}
    assert {point.call for point in found} & {"link", "linkat"}
    seconds = [assert_survives(attempts, tmp_path, point, kind) for point in itertools.islice(found, 0, None, step)]
    return len(seconds), max(seconds)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_of_a_commit_that_fails_or_is_the_last_loses_nothing(kind, attempts, tmp_path, fault_row) -> None:
    count, seconds = fail_every_call(attempts, tmp_path, kind, step=17)
    fault_row(f"{kind} at every 17th system call of a commit", count, count, seconds=seconds)


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_of_a_commit_that_fails_or_is_the_last_loses_nothing(kind, attempts, tmp_path, fault_row) -> None:
    count, seconds = fail_every_call(attempts, tmp_path, kind, step=1)
    fault_row(f"{kind} at every system call of a commit", count, count, seconds=seconds)


def kill_finalize(attempts: Attempts, tmp_path: Path, step: int) -> int:
    """Kill `finalize` at its calls; the next one must write what an undisturbed one does. Returns the kills."""
    path = fresh_root(tmp_path)
    assert attempts.run(path) == 0
    found = points(attempts, path, tmp_path, FINALIZE)
    summary = (MANIFEST, STATISTICS, TOKENS, SUCCESS)
    wanted = {name: LocalRoot(path).read(name) for name in summary}
    for point in found[::step]:
        for name in summary:
            LocalRoot(path).remove(name)
        # Or the attempt would have a folder less to make than the one that was traced.
        (path / TOKENS).parent.rmdir()
        assert injected(attempts, f"{FINALIZE}{path}", point, "signal=SIGKILL") == -signal.SIGKILL, point
        assert verify(LocalRoot(path)).clean, point
        assert attempts.run(f"{FINALIZE}{path}") == 0, point
        assert {name: LocalRoot(path).read(name) for name in summary} == wanted, point
    return len(found[::step])


def test_f50_a_finalize_that_is_killed_is_repeated_to_the_same_bytes(attempts, tmp_path, fault_row) -> None:
    kills = kill_finalize(attempts, tmp_path, step=17)
    fault_row("F50 finalize killed at every 17th system call", kills, kills)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_f50_finalize_killed_at_every_call_is_repeated_to_the_same_bytes(attempts, tmp_path, fault_row) -> None:
    kills = kill_finalize(attempts, tmp_path, step=1)
    fault_row("F50 finalize killed at every system call", kills, kills)


@pytest.mark.matrix
@pytest.mark.parametrize("error", ["EPERM", "EOPNOTSUPP", "EMLINK"])
def test_f44_a_file_system_without_hard_links_commits_by_rename(error, attempts, tmp_path, fault_row) -> None:
    path = fresh_root(tmp_path)
    assert traced(attempts, path, ["-o", "/dev/null", "-e", "trace=link,linkat", "-e",
                                   f"inject=link,linkat:error={error}"]) == 0
    report = verify(LocalRoot(path))
    assert report.clean, report
    assert report.traces == PROMPTS
    assert list(LocalRoot(path).names(SCRATCH)) == []
    fault_row(f"F44 no hard links ({error})", 1, 1)
