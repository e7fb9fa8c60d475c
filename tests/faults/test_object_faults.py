"""F08 to F14: an S3 server behind a proxy that throttles, loses answers, resets, and lies.

Catches a commit that counts twice or not at all because an answer was lost, a run that ends because its store was busy,
one that asks for ever with the wrong key, and bytes that were changed on their way. The store's patience is cut to
seconds; what is tested is what happens before and after it ends.
"""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import obstore
import pytest
from tiny_datasets import make_dataset, start_run

from distill_pipe.errors import StoreAccessError, StoreError, UsageError
from distill_pipe.store import object_root, retry
from distill_pipe.store.finalize import finalize
from distill_pipe.store.manifest import shard_name
from distill_pipe.store.root import open_root
from distill_pipe.store.selftest import require_exclusive_create
from distill_pipe.store.uploads import UPLOADS, UploadGate
from distill_pipe.store.verify import verify
from faults.proxy import Fault, Head, Proxy
from faults.reach import reach
from faults.seaweed import Seaweed

pytestmark = pytest.mark.matrix
PROMPTS, SHARDS = 10, 3


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_LONGEST_PAUSE", 0.2)
    monkeypatch.setattr(UPLOADS, "limit", 4)


@pytest.fixture
def folder(proxy: Proxy, seaweed: Seaweed) -> str:
    """An empty folder, reached through the proxy."""
    return seaweed.new_folder()


def every(n: int, fault: Fault, wanted: Callable[[Head], bool] = lambda _: True) -> Callable[[Head], Fault | None]:
    """Every n-th of the requests that are wanted goes wrong."""
    count = itertools.count(1)
    return lambda head: fault if wanted(head) and next(count) % n == 0 else None


def is_put(head: Head) -> bool:
    return head.method == "PUT"


def is_read(head: Head) -> bool:
    return head.method in ("GET", "HEAD")


def assert_exactly_once(folder: str) -> None:
    report = verify(open_root(folder))
    assert report.clean, report
    assert (report.shards_found, report.traces) == (SHARDS, PROMPTS)


@pytest.mark.parametrize(("case", "fault", "wanted", "n"), [
    ("F08 answer to a create lost after the server stored it", "lose answer", lambda head: head.creates, 2),
    ("F08 answer to any request lost", "lose answer", lambda _: True, 3),
    ("F09 409 on a create, nothing stored", "conflict", lambda head: head.creates, 2),
    ("F10 503 on uploads", "throttle", is_put, 2),
    ("F10 503 and 500 on anything", "error", lambda _: True, 3),
    ("F12 reset in the middle of a request", "reset", is_put, 2),
    ("F12 reset in the middle of an answer", "cut answer", is_read, 3),
    ("F13 a bit of the body flipped on its way", "flip", is_put, 3)])
def test_a_store_that_fails_at_times_makes_the_same_dataset(case, fault, wanted, n, proxy, folder, fault_row) -> None:
    started = time.monotonic()
    proxy.rule = every(n, fault, wanted)
    make_dataset(folder, PROMPTS)
    finalize(open_root(folder))
    assert proxy.faults[fault] > 1
    injections = proxy.faults[fault]
    assert_exactly_once(folder)
    proxy.rule = lambda _: None
    assert_exactly_once(folder)
    fault_row(case, injections, injections, seconds=time.monotonic() - started)


def test_f08_a_create_whose_answer_was_lost_is_ours(proxy: Proxy, folder: str) -> None:
    root = open_root(folder)
    left = ["lose answer"]
    proxy.rule = lambda head: left.pop() if head.creates and left else None
    assert root.create_bytes(b"mine", "x")
    assert not root.create_bytes(b"other", "x")
    assert root.read("x") == b"mine"


def test_f10_a_minute_of_throttling_slows_uploads_down_and_fails_nothing(proxy, folder, monkeypatch, fault_row) -> None:
    """Seconds here; the budget is what makes a minute of it."""
    limits = []
    throttled = UploadGate.throttled
    monkeypatch.setattr(UploadGate, "throttled", lambda gate: (throttled(gate), limits.append(gate.limit)))
    until = time.monotonic() + 3
    proxy.rule = lambda head: "throttle" if is_put(head) and time.monotonic() < until else None
    make_dataset(folder, PROMPTS)
    done = time.monotonic()
    assert done > until
    assert min(limits) == 1
    assert UPLOADS.limit > 1
    assert_exactly_once(folder)
    fault_row("F10 503 on every upload for seconds", proxy.faults["throttle"], proxy.faults["throttle"],
              seconds=done - until)


def test_f10_throttling_beyond_the_budget_ends_the_run_and_the_same_run_goes_on(proxy, folder, monkeypatch) -> None:
    run = start_run(folder, PROMPTS)
    monkeypatch.setattr(object_root, "BUDGET_SECONDS", 1.0)
    monkeypatch.setattr(object_root, "FIRST_SECONDS", 1.0)
    proxy.rule = every(1, "throttle", is_put)
    with pytest.raises(StoreError, match=r"SlowDown \(as the test wants\) after \d+ s; what is committed is safe"):
        make_dataset(folder, PROMPTS)
    proxy.rule = lambda _: None
    assert make_dataset(folder, PROMPTS) == run
    assert_exactly_once(folder)


def test_f11_an_expired_key_ends_the_run_at_once_and_a_new_one_goes_on(proxy: Proxy, folder: str, fault_row) -> None:
    start_run(folder, PROMPTS)
    proxy.rule = every(1, "expire", is_put)
    before, started = proxy.requests, time.monotonic()
    with pytest.raises(StoreAccessError, match="ExpiredToken") as caught:
        make_dataset(folder, PROMPTS)
    assert caught.value.exit_code == 6
    assert proxy.requests - before <= 2, "asked again"
    proxy.rule = lambda _: None
    make_dataset(folder, PROMPTS)
    assert_exactly_once(folder)
    fault_row("F11 key expires in the middle of a run", 1, 1, seconds=time.monotonic() - started)


@pytest.fixture
def unsigned(folder: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder as anybody reaches it: requests may be changed on their way."""
    open_root(folder).publish_bytes(b"", ".tmp/first")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    return folder


def test_f14_a_store_that_ignores_the_condition_is_refused_at_the_start(proxy, unsigned, fault_row) -> None:
    root = open_root(unsigned)
    require_exclusive_create(root)
    proxy.rule = every(1, "strip", lambda head: head.creates)
    with pytest.raises(UsageError, match="ignores the condition to write only where nothing is"):
        require_exclusive_create(root)
    fault_row("F14 store ignores If-None-Match: refused at the start", 1, 1)


def test_f14_should_the_condition_be_ignored_later_shards_are_still_whole_and_once(proxy: Proxy, unsigned: str) -> None:
    """Two attempts at everything: the second replaces the first, whole by whole, and verify says what changed."""
    proxy.rule = every(1, "strip", lambda head: head.creates)
    make_dataset(unsigned, PROMPTS)
    make_dataset(unsigned, PROMPTS)
    proxy.rule = lambda _: None
    report = verify(open_root(unsigned))
    assert (report.shards_found, report.missing_prompts, report.doubled_prompts) == (SHARDS, 0, 0)
    assert report.clean, report


def test_f15_two_processes_race_for_every_shard_in_a_store(folder, tmp_path, fault_row) -> None:
    make_dataset(tmp_path / "donor", PROMPTS)
    start_run(folder, PROMPTS)
    line = [sys.executable, str(Path(__file__).parents[1] / "committer.py"), str(tmp_path / "donor"), folder]
    racers = [subprocess.Popen(line, stdout=subprocess.DEVNULL) for _ in range(2)]
    try:
        assert [racer.wait(120) for racer in racers] == [0, 0]
    finally:
        for racer in racers:
            racer.kill()
    assert_exactly_once(folder)
    fault_row("F15 two processes race for every shard in S3", SHARDS, SHARDS)


def test_a_listing_that_fails_in_the_middle_is_not_taken_for_a_short_one(proxy, folder, seaweed) -> None:
    store = seaweed.store(folder)
    for i in range(2100):
        obstore.put(store, f"data/{i:05d}", b"")
    before = proxy.requests
    assert sum(1 for _ in open_root(folder).names("data")) == 2100
    assert proxy.requests - before == 3, "a request per 1,000 names"
    proxy.rule = every(2, "error", lambda head: "list-type" in head.target)
    assert list(open_root(folder).names("data")) == [f"data/{i:05d}" for i in range(2100)]
    assert proxy.faults["error"] >= 2


def test_an_endpoint_that_nobody_listens_on_is_given_up_soon(monkeypatch: pytest.MonkeyPatch, seaweed: Seaweed) -> None:
    monkeypatch.setattr(object_root, "FIRST_SECONDS", 1.0)
    reach(seaweed, monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"after [12] s"):
        open_root("s3://tests/x").read("run.json")


def test_a_corrupted_answer_is_seen_by_its_hash(proxy: Proxy, folder: str) -> None:
    make_dataset(folder, PROMPTS)
    root = open_root(folder)
    data = root.read(shard_name(1))
    assert data is not None
    root.publish_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:], shard_name(1))
    (problem,) = verify(root).problems
    assert problem == f"{folder}/{shard_name(1)} has changed: its sha256 is not the one recorded"
