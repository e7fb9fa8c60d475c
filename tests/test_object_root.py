"""The promises of a root, held by the local disk, by an object store in memory and by a real S3 server alike; and, in
`make faults`, by servers of Azure's and Google's kind.

Catches a place where a second `create` writes over the first, where a missing file is an error or an error a missing
file, where scratch stays behind, and where a dataset that is whole on one kind of root is not on another.
"""

import os
import re
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
from faults.seaweed import Seaweed
from hypothesis import given
from hypothesis import strategies as st
from tiny_datasets import make_dataset

from distill_pipe.errors import DamageError, MismatchError, StorageFullError, StoreAccessError, UsageError
from distill_pipe.store.commit import committed_shards, restore_fragments
from distill_pipe.store.finalize import finalize
from distill_pipe.store.inspect import inspect_trace
from distill_pipe.store.manifest import fragment_name, require_run, shard_name
from distill_pipe.store.plan import read_planned_shard
from distill_pipe.store.root import LocalRoot, Root, open_root
from distill_pipe.store.selftest import require_exclusive_create
from distill_pipe.store.status import status
from distill_pipe.store.verify import verify

PLACES = ("local", "memory", "s3", *(pytest.param(cloud, marks=pytest.mark.faults) for cloud in ("az", "gs")))
PROMPTS = 10


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty place of each kind. Copies and scratch of object stores go below `tmp_path`, and must be gone."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    if request.param == "local":
        yield str(tmp_path / "root")
    elif request.param == "memory":
        yield f"memory://{uuid.uuid4().hex}"
    else:
        yield request.getfixturevalue(f"{request.param}_folder")
    assert list(scratch.iterdir()) == []


@pytest.fixture
def root(place: str) -> Root:
    return open_root(place)


def test_what_is_put_is_read_back_and_what_is_not_there_is_none(root: Root, tmp_path: Path) -> None:
    assert (root.read("a/b.json"), root.size("a/b.json"), list(root.names("a"))) == (None, None, [])
    root.publish_bytes(b"one", "a/b.json")
    root.publish_bytes(b"three", "a/b.json")
    (tmp_path / "file").write_bytes(b"content")
    root.publish(tmp_path / "file", "a/c")
    assert (root.read("a/b.json"), root.size("a/b.json")) == (b"three", 5)
    assert sorted(root.names("a")) == ["a/b.json", "a/c"]
    assert [(e.name, e.size) for e in sorted(root.entries("a"))] == [("a/b.json", 5), ("a/c", 7)]
    with root.fetched("a/c", 7) as path:
        assert path.read_bytes() == b"content"


def test_a_folder_is_listed_by_whole_names(root: Root) -> None:
    for name in ("data/1", "data/x/2", "database/3"):
        root.publish_bytes(b"", name)
    assert sorted(root.names("data")) == ["data/1", "data/x/2"]


def test_only_the_first_create_counts(root: Root, tmp_path: Path) -> None:
    assert root.create_bytes(b"mine", "x/y")
    assert not root.create_bytes(b"other", "x/y")
    (tmp_path / "file").write_bytes(b"file!")
    assert not root.create(tmp_path / "file", "x/y")
    assert root.read("x/y") == b"mine"
    require_exclusive_create(root)


def test_of_many_creates_at_once_one_wins(root: Root) -> None:
    won: list[int] = []
    start = threading.Barrier(8)

    def attempt(i: int) -> None:
        start.wait()
        if root.create_bytes(b"%d" % i, "race"):
            won.append(i)

    threads = [threading.Thread(target=attempt, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert root.read("race") == b"%d" % won[0]


def test_a_removed_file_is_gone_and_removing_it_again_is_no_error(root: Root) -> None:
    root.publish_bytes(b"1", ".tmp/1/part")
    root.remove(".tmp/1/part")
    root.remove(".tmp/1/part")
    assert list(root.names(".tmp")) == []


def test_what_a_false_start_left_behind_does_not_use_a_place_up(root: Root) -> None:
    assert root.is_unused()
    root.publish_bytes(b"1", "plan/part-000.parquet")
    root.publish_bytes(b"1", ".tmp/x/part")
    assert root.is_unused()
    root.publish_bytes(b"1", "notes.txt")
    assert not root.is_unused()


def test_a_record_that_is_too_large_is_refused(root: Root) -> None:
    root.publish_bytes(bytes((16 << 20) + 1), "run.json")
    with pytest.raises(DamageError, match="no record is that large"):
        root.read("run.json")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", ""])
def test_names_stay_inside_the_root(root: Root, name: str) -> None:
    with pytest.raises(UsageError):
        list(root.names(name))


def test_scratch_is_gone_whatever_happens(root: Root) -> None:
    folders = []

    def fail() -> None:
        with root.scratch() as folder:
            folders.append(folder)
            (folder / "part").write_bytes(b"1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not folders[0].exists()


def test_a_dataset_is_made_read_summed_up_and_verified_in_any_place(place: str, tmp_path: Path) -> None:
    run, root = make_dataset(place, PROMPTS), open_root(place)
    assert committed_shards(root) == {0, 1, 2}
    report = verify(root)
    assert report.clean, report
    assert (report.traces, report.orphans) == (PROMPTS, ())
    assert [p.ordinal for p in read_planned_shard(root, run, 2)] == [8, 9]
    assert len(inspect_trace(root, 3, 2)[0]) > 4
    root.remove(fragment_name(1))
    assert restore_fragments(root, run, {0, 1, 2}) == 1
    assert restore_fragments(root, run, {0, 1, 2}) == 0
    found = status(root)
    assert (found.shards_done, found.shards_counted, found.traces, found.complete) == (3, 3, PROMPTS, True)
    make_dataset(tmp_path / "again", PROMPTS)
    assert finalize(root).statistics.statistics == finalize(LocalRoot(tmp_path / "again")).statistics.statistics
    assert require_run(root) == run


@pytest.fixture
def objects(place: str) -> Root:
    """An object store, of either kind."""
    if "://" not in place:
        pytest.skip("a local disk copies nothing")
    make_dataset(place, 4)
    return open_root(place)


def test_a_file_of_another_size_than_its_record_says_is_not_downloaded(objects: Root) -> None:
    with pytest.raises(DamageError, match=r"shard-0000000.parquet has \d+ bytes, expected 7"), objects.fetched(
            shard_name(0), 7):
        pass
    with pytest.raises(DamageError, match=r"shard-0000009\.parquet is missing"), objects.fetched(shard_name(9)):
        pass


def test_messages_of_readers_name_the_object_and_not_its_copy(objects: Root) -> None:
    objects.publish_bytes(b"no parquet at all", shard_name(0))
    objects.remove(fragment_name(0))
    (problem,) = verify(objects).problems
    assert problem.startswith(f"{objects}/{shard_name(0)}: cannot be read")
    assert tempfile.gettempdir() not in problem


def test_a_copy_that_does_not_fit_is_not_begun(objects: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(StorageFullError, match="point TMPDIR to a larger disk"), objects.fetched(shard_name(0)):
        pass


@given(size=st.integers(0, 40), part=st.integers(1, 9))
def test_a_copy_made_in_parts_is_the_object(size: int, part: int) -> None:
    place = f"memory://{uuid.uuid4().hex}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill_pipe.store.object_root._PART_BYTES", part)
        data = bytes(range(size))
        open_root(place).publish_bytes(data, "x")
        with open_root(place).fetched("x", size) as path:
            assert path.read_bytes() == data


def test_of_an_opened_file_only_what_is_read_is_asked_for(objects: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bytes(range(200))
    objects.publish_bytes(whole, "x")
    asked: list[tuple[int, int]] = []
    get = obstore.get
    monkeypatch.setattr(obstore, "get", lambda store, name, options: (
        asked.append(options["range"]), get(store, name, options=options))[1])
    with objects.opened("x") as file:
        assert (file.seek(-10, os.SEEK_END), file.read(4), file.tell()) == (190, whole[190:194], 194)
        file.seek(20)
        file.seek(5, os.SEEK_CUR)
        assert (file.read(5), file.seek(195), file.read(100), file.read(1)) == (whole[25:30], 195, whole[195:], b"")
    assert asked == [(190, 194), (25, 30), (195, 200)]


def test_parts_of_two_versions_of_an_object_are_not_mixed(objects: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_pipe.store.object_root._PART_BYTES", 4)
    objects.publish_bytes(b"12345678", "x")
    get = obstore.get

    def replaced(store: object, name: str, options: object) -> object:
        monkeypatch.setattr(obstore, "get", get)
        found = get(store, name, options=options)
        objects.publish_bytes(b"abcdefgh", "x")
        return found

    monkeypatch.setattr(obstore, "get", replaced)
    with pytest.raises(DamageError, match="was replaced while it was read"), objects.fetched("x"):
        pass


def test_a_listing_of_many_pages_is_whole(s3_folder: str, seaweed: Seaweed) -> None:
    store = seaweed.store(s3_folder)
    for i in range(1100):
        obstore.put(store, f"data/{i:05d}", b"")
    assert list(open_root(s3_folder).names("data")) == [f"data/{i:05d}" for i in range(1100)]


@pytest.mark.parametrize(("change", "address", "error", "text"), [
    ({}, "s3://there-is-none/x", UsageError, r"s3://there-is-none/x\S*: NoSuchBucket .*check the bucket's name"),
    ({"AWS_SECRET_ACCESS_KEY": "wrong"}, None, StoreAccessError, "SignatureDoesNotMatch .*give credentials"),
    ({"AWS_ACCESS_KEY_ID": "wrong"}, None, StoreAccessError, "InvalidAccessKeyId"),
    ({"AWS_ALLOW_HTTP": "false"}, None, UsageError, "AWS_ALLOW_HTTP=true"),
])
def test_a_wrong_address_or_key_is_one_line_at_once(s3_folder: str, monkeypatch, change, address, error, text) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    for ask in (lambda root: root.is_unused(), require_run, committed_shards):
        with pytest.raises(error) as caught:
            ask(open_root(address or s3_folder))
        assert re.search(text, str(caught.value))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["ftp://host/x", "s3://", "s3://b/x?versionId=1", "s3://key:secret@b/x", "az://box/x"])
def test_an_address_that_is_none_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(UsageError) as caught:
        open_root(address)
    assert "secret" not in str(caught.value)


def test_a_place_that_writes_over_what_is_there_is_refused(tmp_path: Path) -> None:
    class Careless(LocalRoot):
        def create_bytes(self, data: bytes, name: str) -> bool:
            self.publish_bytes(data, name)
            return True

    with pytest.raises(UsageError, match="ignores the condition"):
        require_exclusive_create(Careless(tmp_path))
    assert list(LocalRoot(tmp_path).names(".tmp")) == []


def test_a_dataset_of_a_missing_folder_is_refused(root: Root) -> None:
    with pytest.raises(MismatchError, match="is not a distill-pipe dataset"):
        status(root)
