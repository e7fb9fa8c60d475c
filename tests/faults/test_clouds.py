"""`az://` and `gs://` against servers of their kind: Microsoft's Azurite, and a stand-in for Google (see `fake_gcs`).

Catches what only another vendor's client and words bring up: a refusal that is not understood as one, a create that is
lost or counted twice, parts of two versions in one copy, and advice that names the settings of S3. The promises of a
root are held by both in `test_object_root`.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import SETTINGS, assert_same_rows, fake_job, questions, run_here
from runs import prompt_records, succeed, write_corpus
from tiny_datasets import make_dataset, start_run

from distill_pipe.errors import DistillPipeError, StoreAccessError, UsageError
from distill_pipe.store import object_root, retry
from distill_pipe.store.commit import committed_shards
from distill_pipe.store.finalize import finalize
from distill_pipe.store.manifest import require_run
from distill_pipe.store.root import open_root
from distill_pipe.store.uploads import UPLOADS
from distill_pipe.store.verify import verify
from faults.azurite import Azurite
from faults.fake_gcs import FakeGcs
from faults.proxy import Fault, Head, Proxy
from faults.reach import reach
from faults.test_object_runs import copied

pytestmark = pytest.mark.faults
PROMPTS, SHARDS = 10, 3
NAMES = {"az": "AZURE", "gs": "GOOGLE"}


@pytest.fixture(params=sorted(NAMES))
def cloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Azurite | FakeGcs:
    """Each server, reachable by what is in the environment."""
    server: Azurite | FakeGcs = request.getfixturevalue({"az": "azurite", "gs": "fake_gcs"}[request.param])
    reach(server, monkeypatch)
    monkeypatch.setattr(retry, "_LONGEST_PAUSE", 0.2)
    monkeypatch.setattr(UPLOADS, "limit", 4)
    return server


@pytest.fixture
def between(cloud: Azurite | FakeGcs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of it."""
    proxy = Proxy(cloud.port)
    reach(cloud, monkeypatch, proxy.endpoint)
    yield proxy
    proxy.close()


def assert_exactly_once(folder: str) -> None:
    report = verify(open_root(folder))
    assert report.clean, report
    assert (report.shards_found, report.traces) == (SHARDS, PROMPTS)


@pytest.mark.parametrize(("case", "fault", "n"), [
    ("F08 answer to a create lost after the server stored it", "lose answer", 2),
    ("F10 503 on uploads", "throttle", 2), ("F12 reset in the middle of a request", "reset", 2),
    ("F12 reset in the middle of an answer", "cut answer", 3)])
def test_a_store_that_fails_at_times_makes_the_same_dataset(case, fault, n, cloud, between, fault_row) -> None:
    folder, count = cloud.new_folder(), itertools.count(1)

    def rule(head: Head) -> Fault | None:
        wanted = {"lose answer": head.creates, "cut answer": head.method in ("GET", "HEAD")}
        return fault if wanted.get(fault, head.method == "PUT") and next(count) % n == 0 else None

    between.rule = rule
    make_dataset(folder, PROMPTS)
    finalize(open_root(folder))
    injections = between.faults[fault]
    assert injections > 1
    between.rule = lambda _: None
    assert_exactly_once(folder)
    fault_row(f"{case}, {folder[:2]}", injections, injections)


def test_f08_a_create_whose_answer_was_lost_is_ours(cloud: Azurite | FakeGcs, between: Proxy) -> None:
    root, left = open_root(cloud.new_folder()), ["lose answer"]
    between.rule = lambda head: left.pop() if head.creates and left else None
    assert root.create_bytes(b"mine", "x")
    assert not left
    assert not root.create_bytes(b"other", "x")
    assert root.read("x") == b"mine"


def test_f15_two_processes_race_for_every_shard(cloud, tmp_path, fault_row) -> None:
    folder = cloud.new_folder()
    make_dataset(tmp_path / "donor", PROMPTS)
    start_run(folder, PROMPTS)
    line = [sys.executable, str(Path(__file__).parents[1] / "committer.py"), str(tmp_path / "donor"), folder]
    racers = [subprocess.Popen(line, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [racer.wait(120) for racer in racers] == [0, 0]
    assert_exactly_once(folder)
    fault_row(f"F15 two processes race for every shard, {folder[:2]}", SHARDS, SHARDS)


def test_a_file_of_several_parts_is_uploaded_whole(cloud, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(object_root, "_PART_BYTES", 5 << 20)
    root, data = open_root(cloud.new_folder()), os.urandom(13 << 20)
    (tmp_path / "large").write_bytes(data)
    root.publish(tmp_path / "large", "a/large")
    with root.fetched("a/large", len(data)) as path:
        assert path.read_bytes() == data


def test_a_listing_of_many_pages_is_whole(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Azure gives 5,000 names at a time. The stand-in for Google gives all at once."""
    reach(azurite, monkeypatch)
    root = open_root(azurite.new_folder())
    for i in range(5100):
        root.publish_bytes(b"", f"data/{i:05d}")
    assert list(root.names("data")) == [f"data/{i:05d}" for i in range(5100)]


@pytest.mark.parametrize(("scheme", "change", "address", "error", "text"), [
    ("az", {}, "az://there-is-none/x", UsageError, "ContainerNotFound .*check the names of container and account"),
    ("az", {"AZURE_STORAGE_ACCOUNT_KEY": "d3Jvbmc="}, None, StoreAccessError, "AZURE_STORAGE_ACCOUNT_KEY"),
    ("az", {"AZURE_ALLOW_HTTP": "false"}, None, UsageError, "AZURE_ALLOW_HTTP=true"),
    ("gs", {}, "gs://there-is-none/x", UsageError, "check the bucket's name, and the endpoint"),
    ("gs", {"GOOGLE_ALLOW_HTTP": "false"}, None, UsageError, "GOOGLE_ALLOW_HTTP=true"),
    ("gs", {"GOOGLE_SERVICE_ACCOUNT": "/none.json"}, None, DistillPipeError, "GOOGLE_SERVICE_ACCOUNT")])
def test_a_wrong_address_or_key_is_one_line_at_once(request, monkeypatch, scheme, change, address, error, text) -> None:
    folder = request.getfixturevalue(f"{scheme}_folder")
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    for ask in (committed_shards, require_run):
        with pytest.raises(error, match=text) as caught:
            ask(open_root(address or folder))
        assert "\n" not in str(caught.value)
        assert "AWS" not in str(caught.value)


@pytest.mark.ray
def test_a_whole_run_with_every_command(cloud: Azurite | FakeGcs, tmp_path: Path) -> None:
    folder = cloud.new_folder()
    corpus = write_corpus(tmp_path / "corpus.jsonl", prompt_records(questions(24)))
    succeed("generate", "--corpus", corpus, "--out", folder, *SETTINGS)
    assert json.loads(succeed("status", folder, "--json").stdout)["shards_done"] == 6
    succeed("verify", folder, "--deep")
    succeed("finalize", folder)
    open_root(folder).publish_bytes(b"", ".tmp/left/behind")
    assert json.loads(succeed("gc", folder, "--delete", "--json").stdout)["young"] == 1
    succeed("generate", "--corpus", corpus, "--out", folder, *SETTINGS)
    probes = json.loads(succeed("selftest", "--output", folder, "--json").stdout)["probes"]
    assert [probe["name"] for probe in probes if not probe["passed"]] == []
    job = fake_job(tmp_path, "plain", prompts=questions(24))
    run_here(job)
    assert_same_rows(copied(folder, tmp_path / "copy"), Path(job.out))
