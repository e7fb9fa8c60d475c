"""Catches a remote corpus that is read otherwise than the same file here, copied whole, or not pinned to its commit.

The hub is a local HTTP server behind huggingface_hub's own client; the object store is obstore's own over a folder.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, hub_server
from test_corpus import compressed, read, write

from distill_pipe.errors import UsageError
from distill_pipe.produce.corpus import NAMED, corpus_files, sources
from distill_pipe.produce.sources import find_sources
from distill_pipe.store.root import sha256_of

REPO = "nobody/corpus"
RECORDS = [{"id": f"r{i}", "prompt": f"{i} {random.Random(i).getrandbits(4000):x}"} for i in range(600)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of the dataset."""
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    write(folder / "data" / "train-00000-of-00002.parquet", RECORDS[:300])
    write(folder / "data" / "train-00001-of-00002.parquet", RECORDS[300:])
    write(folder / "data" / "test-00000-of-00001.parquet", RECORDS[:1])
    write(folder / "extra.jsonl", RECORDS[:5])
    (folder / "README.md").write_text("hello")
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    with hub_server() as served:
        served.hold(REPO, folder)
        yield served


def on_hub(hub: Hub, home: Path, code: str) -> str:
    """Run some lines where the stand-in is the hub: huggingface_hub reads its address when it is imported."""
    lines = ("import json\nfrom distill_pipe.produce.corpus import corpus_files, read_prompts, sources\n" + code)
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=300, env={
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_dataset_of_the_hub_reads_as_its_files_do_here(hub: Hub, folder: Path, tmp_path: Path) -> None:
    found = json.loads(on_hub(hub, tmp_path / "home", f"""
names = ["hf://datasets/{REPO}"]
prompts = [(p.ordinal, p.prompt_id, p.messages[0].content) for p in read_prompts(names, "target", None)]
files = [(f.name, f.sha256) for f in corpus_files(names)]
print(json.dumps([prompts, files, [s.address for s in sources(names)]]))"""))
    prompts, files, addresses = found
    training = sorted(folder.glob("data/train-*"))
    assert [tuple(p) for p in prompts] == [(p.ordinal, p.prompt_id, p.messages[0].content)
                                           for p in read(*training, responses="target")]
    assert [tuple(f) for f in files] == [(path.name, sha256_of(path)) for path in training]
    assert addresses[0] == f"hf://datasets/{REPO}@{hub.repos[REPO].commits[-1]}/data/train-00000-of-00002.parquet"


def test_only_what_a_limit_wants_is_fetched_and_hashes_are_not_read(hub: Hub, tmp_path: Path) -> None:
    on_hub(hub, tmp_path / "home", f"""
names = ["hf://datasets/{REPO}@main/data"]
assert len(list(read_prompts(names, "target", 10))) == 10
assert len(corpus_files(names)) == 2""")
    asked = [line for line in hub.requests if "/resolve/" in line]
    assert asked
    assert not [line for line in asked if "train-00001" in line]


def test_a_file_of_the_hub_and_what_is_not_there(hub: Hub, folder: Path, tmp_path: Path) -> None:
    out = on_hub(hub, tmp_path / "home", f"""
print([s.name for s in sources(["hf://datasets/{REPO}/extra.jsonl"])])
print(corpus_files(["hf://datasets/{REPO}/extra.jsonl"])[0].sha256)
print(len(list(read_prompts(["hf://datasets/{REPO}/extra.jsonl"], "target", None))))
from distill_pipe.errors import UsageError
for name in ("{REPO}/nothing", "nobody/else", "nonsense"):
    try: sources(["hf://datasets/" + name])
    except UsageError as error: print(error)""").splitlines()
    assert out[:3] == ["['extra.jsonl']", sha256_of(folder / "extra.jsonl"), "5"]
    for line, message in zip(out[3:], ("no file of a known kind is there; known are .jsonl", "cannot be had from the",
                                       "write hf://datasets/OWNER/NAME"), strict=True):
        assert message in line


def test_a_few_corpora_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("distill_pipe.produce.corpus.find_sources", lambda address: asked.append(address) or [])
    sources(["infinity-instruct", "nebius/Llama-3.1-8B-Instruct-Infinity-Instruct-0625", "mine.jsonl", "nebius/else"])
    assert asked == [NAMED["infinity-instruct"],
                     "hf://datasets/nebius/Llama-3.1-8B-Instruct-Infinity-Instruct-0625", "mine.jsonl", "nebius/else"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_an_object_reads_as_the_same_file_does_here(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"c{suffix}", RECORDS)
    assert read(path.as_uri(), responses="target") == read(path, responses="target")
    assert corpus_files([path.as_uri()]) == corpus_files([str(path)])


def test_an_object_can_be_read_at_any_place(tmp_path: Path) -> None:
    data = bytes(random.Random(0).randbytes(100_000))
    (tmp_path / "c.jsonl").write_bytes(data)
    (source,) = find_sources((tmp_path / "c.jsonl").as_uri())
    with source.open() as file:
        for at, length in ((0, 10), (99_990, 100), (50_000, 0), (7, 60_000)):
            file.seek(at)
            assert file.read(length) == data[at:at + length]
        assert file.seek(-5, os.SEEK_END) == 99_995
        assert file.read() == data[-5:]


def test_objects_that_are_missing_empty_or_cut_off_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    cut = compressed(b"".join(json.dumps(r).encode() + b"\n" for r in RECORDS), ".zst")[:-100]
    (tmp_path / "cut.jsonl.zst").write_bytes(cut)
    for name, message in (("gone.jsonl", "cannot be read"), ("empty.jsonl", "the file is empty"),
                          ("cut.jsonl.zst", "cannot be read"), ("c.csv", "unknown kind of file")):
        with pytest.raises(UsageError, match=rf"{name}.*{message}"):
            read((tmp_path / name).as_uri(), responses="target")
