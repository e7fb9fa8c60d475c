"""A dataset on the Hub and back, through the real client and a server that fails as the Hub does: nothing is sent
twice, nothing is lost, and nothing that belongs to somebody else is replaced.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import Fault, Hub, hub_server
from runs import succeed
from tiny_datasets import Shape, commit_traces, make_dataset, random_trace, start_run

from distill_pipe.cli import main
from distill_pipe.consume.reader import ShardReader
from distill_pipe.errors import DamageError, MismatchError, StoreAccessError, StoreError
from distill_pipe.hub.pull import Pulled, pull
from distill_pipe.hub.push import Pushed, push
from distill_pipe.hub.remote import WAITS, Repository
from distill_pipe.report.collect import collect
from distill_pipe.store.card import write_card
from distill_pipe.store.manifest import require_run
from distill_pipe.store.root import open_root
from distill_pipe.store.verify import verify

# The client's own use of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
REPO = "someone/tiny"
SHAPE = Shape(prompts_per_shard=2)
DERIVED = {"manifest.parquet", "statistics.json", "statistics/tokens.parquet", "_SUCCESS"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, which the client of this process and of every process below it talks to."""
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
        # This process read the first two when it imported the client.
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                            f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield server


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Five shards with a card."""
    folder = tmp_path / "dataset"
    write_card(open_root(folder), make_dataset(folder, 10, SHAPE))
    return folder


def nothing(*_: object) -> None:
    """What is called between the steps."""


def pushed(folder: str | Path, repository: str = REPO) -> Pushed:
    return push(open_root(folder), Repository(repository), private=True, on_commit=nothing)


def pulled(folder: str | Path) -> Pulled:
    return pull(Repository(REPO), open_root(folder), revision=None, on_part=nothing)


def tree_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*")
            if p.is_file() and ".tmp" not in p.parts}


def test_a_pushed_dataset_pulled_again_is_the_same(hub: Hub, dataset: Path, tmp_path: Path) -> None:
    done = json.loads(succeed("push", dataset, REPO, "--json").stdout)
    assert (done["complete"], done["sent"]) == (True, done["files"])
    assert hub.repos[REPO].private
    assert [m.partition(": ")[2] for m in hub.repos[REPO].messages] == [
        "run, plan and card", "shards 0 to 4", "the dataset is complete"]
    back = json.loads(succeed("pull", REPO, tmp_path / "back", "--json").stdout)
    assert back["fetched"] == back["files"] == done["files"]
    here, there = tree_of(dataset), tree_of(tmp_path / "back")
    card = there.pop("README.md")
    assert card.startswith(here.pop("README.md"))
    assert there == here
    assert verify(open_root(tmp_path / "back")).clean
    assert sum(len(batch.token_ids_T) for batch in ShardReader(tmp_path / "back", layers=(1, 4), split="all")) > 0


def test_a_second_push_and_a_second_pull_move_nothing(hub: Hub, dataset: Path, tmp_path: Path) -> None:
    pushed(dataset)
    commits, stored = list(hub.repos[REPO].commits), dict(hub.stored)
    again = pushed(dataset)
    assert (again.sent, again.commits) == (0, 0)
    assert (hub.repos[REPO].commits, dict(hub.stored)) == (commits, stored)
    pulled(tmp_path / "back")
    fetched = dict(hub.fetched)
    assert pulled(tmp_path / "back").fetched == 0
    assert dict(hub.fetched) == fetched


def test_a_run_that_grows_is_pushed_in_steps_and_is_readable_at_each(hub: Hub, tmp_path: Path) -> None:
    whole, growing = tmp_path / "whole", tmp_path / "growing"
    make_dataset(whole, 6, SHAPE)
    run = start_run(growing, 6, SHAPE)
    for part in ("hidden_states", "data", "_manifest"):
        for path in sorted((whole / part).rglob("*0000000*")):
            (growing / path.relative_to(whole)).parent.mkdir(parents=True, exist_ok=True)
            (growing / path.relative_to(whole)).write_bytes(path.read_bytes())
    first = pushed(growing)
    assert not first.complete
    assert not DERIVED & set(hub.repos[REPO].trees[-1])
    pulled(tmp_path / "early")
    assert require_run(open_root(tmp_path / "early")) == run
    assert len(list((tmp_path / "early" / "data").rglob("*.parquet"))) == 1
    pushed(whole)
    assert set(hub.repos[REPO].trees[-1]) >= DERIVED
    # The card grows with the dataset; of what was there, nothing else is sent again.
    assert max(hub.stored.values()) == 1
    pulled(tmp_path / "early")
    assert verify(open_root(tmp_path / "early")).clean


FAULTS = {
    "429 everywhere": [Fault(method, "", 429) for method in ("GET", "POST", "PUT")],
    "412 on a commit": [Fault("POST", "/commit/", 412, times=2)],
    "500 on a commit": [Fault("POST", "/commit/", 500)],
    "500 but committed": [Fault("POST", "/commit/", 500, times=3, committed=True)],
    "an answer that never comes": [Fault("POST", "/commit/", 0, committed=True), Fault("GET", "/tree/", 0)],
    "uploads that fail": [Fault("PUT", "/lfs/", 503, times=3), Fault("POST", "/batch", 502)],
}


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures are tried again at once."""
    monkeypatch.setattr(time, "sleep", nothing)


@pytest.mark.parametrize("name", FAULTS)
def test_failures_that_pass_are_waited_out_and_nothing_is_committed_twice(hub: Hub, dataset: Path, no_waiting,
                                                                          name) -> None:
    hub.faults = [replace(fault) for fault in FAULTS[name]]
    pushed(dataset)
    assert all(fault.times == 0 for fault in hub.faults)
    assert {n: hub.blobs[d] for n, d in hub.repos[REPO].trees[-1].items() if n != "README.md"} == {
        n: data for n, data in tree_of(dataset).items() if n != "README.md"}
    assert max(hub.stored.values()) == 1
    assert len(hub.repos[REPO].messages) == 3


def test_a_hub_that_keeps_failing_ends_the_push_and_is_not_waited_for_in_silence(hub: Hub, dataset: Path, no_waiting,
                                                                                 caplog) -> None:
    hub.faults = [Fault("POST", "/commit/", 500, times=1000)]
    with pytest.raises(StoreError, match="the same command goes on where this one stopped"):
        pushed(dataset)
    assert hub.faults[0].times == 1000 - len(WAITS) - 1
    assert [r.getMessage().endswith("trying again for up to 615 s") for r in caplog.records] == [True]


def test_a_push_that_is_killed_again_and_again_ends_with_the_same_tree_and_uploads_nothing_twice(
        hub: Hub, dataset: Path, tmp_path: Path) -> None:
    hub.seconds_per_upload = 0.3
    line = [sys.executable, "-c", "from distill_pipe.cli import main; main()", "push", str(dataset), REPO]
    for uploads in (1, 6, 11):
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 120
            while len(hub.stored) < uploads and process.poll() is None and time.monotonic() < end:
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        hub.settle()
        assert len(hub.stored) >= uploads
    hub.seconds_per_upload = 0
    pushed(dataset)
    assert max(hub.stored.values()) == 1
    assert set(hub.repos[REPO].trees[-1]) == set(tree_of(dataset))
    pulled(tmp_path / "back")
    assert verify(open_root(tmp_path / "back")).clean


def test_a_pull_that_fails_leaves_a_valid_dataset_and_the_same_command_fetches_the_rest(
        hub: Hub, dataset: Path, tmp_path: Path) -> None:
    pushed(dataset)
    hub.faults = [Fault("GET", "shard-0000003.parquet", 404, times=1000)]
    with pytest.raises(StoreAccessError, match="shard-0000003"):
        pulled(tmp_path / "back")
    left = list((tmp_path / "back" / "data").rglob("*.parquet"))
    assert len(left) < 5
    assert not (tmp_path / "back" / "_SUCCESS").exists()
    report = verify(open_root(tmp_path / "back"))
    assert not [p for p in report.problems if "hidden" in str(p)]
    before, hub.faults = dict(hub.fetched), []
    pulled(tmp_path / "back")
    assert verify(open_root(tmp_path / "back")).clean
    assert all(hub.fetched[f"data/train/0000/{p.name}"] == before[f"data/train/0000/{p.name}"] for p in left)


def test_a_pull_waits_out_failures_that_pass(hub: Hub, dataset: Path, tmp_path: Path, no_waiting) -> None:
    pushed(dataset)
    # Six in a row are more than the client itself tries.
    hub.faults = [Fault("HEAD", "shard-0000001", 503, times=7), Fault("GET", "shard-0000002", 0),
                  Fault("GET", "/tree/", 429), Fault("HEAD", "run.json", 500, times=7)]
    pulled(tmp_path / "back")
    assert all(fault.times == 0 for fault in hub.faults)
    assert verify(open_root(tmp_path / "back")).clean


def test_another_run_is_neither_pushed_over_nor_pulled_over(hub: Hub, dataset: Path, tmp_path: Path) -> None:
    pushed(dataset)
    other = tmp_path / "other"
    make_dataset(other, 8, SHAPE)
    tree = dict(hub.repos[REPO].trees[-1])
    with pytest.raises(MismatchError, match="holds another run"):
        pushed(other)
    assert hub.repos[REPO].trees[-1] == tree
    with pytest.raises(MismatchError, match="holds another run"):
        pulled(other)


def test_another_copy_of_the_run_is_not_mixed_in(hub: Hub, dataset: Path, tmp_path: Path) -> None:
    pushed(dataset)
    twin = tmp_path / "twin"
    run = start_run(twin, 10, SHAPE)
    commit_traces(twin, run, [random_trace(i, SHAPE, seed=1) for i in range(10)])
    with pytest.raises(MismatchError, match="another copy of this one"):
        pushed(twin)
    with pytest.raises(MismatchError, match="another copy of this one"):
        pulled(twin)


def test_a_file_that_changed_after_its_commit_is_not_pushed(hub: Hub, dataset: Path) -> None:
    [path, *_] = sorted((dataset / "hidden_states").rglob("*.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamageError, match="its sha256 is not the one recorded"):
        pushed(dataset)


def test_a_file_that_arrives_changed_is_not_put_in_place(hub: Hub, dataset: Path, tmp_path: Path) -> None:
    pushed(dataset)
    name = "data/train/0000/shard-0000001.parquet"
    digest = hub.repos[REPO].trees[-1][name]
    hub.blobs[digest] = bytes([hub.blobs[digest][0] ^ 1]) + hub.blobs[digest][1:]
    with pytest.raises(DamageError, match="did not arrive as the Hub describes it"):
        pulled(tmp_path / "back")
    assert not (tmp_path / "back" / name).exists()


def test_names_that_lead_out_of_the_dataset_are_not_fetched(hub: Hub, dataset: Path, tmp_path: Path) -> None:
    pushed(dataset)
    evil = hub.keep(b"evil")
    hub.repos[REPO].trees[-1] |= dict.fromkeys(
        ("data/train/../../../../evil", "plan/.hidden", "setup.py", ".gitattributes", "data/trainer.py"), evil)
    pulled(tmp_path / "deep" / "back")
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.read_bytes() == b"evil"]


@pytest.mark.parametrize(("args", "code", "says"), [
    (("pull", "someone/nothing", "{}/back"), 6, "hf auth login"),
    (("pull", "not a name", "{}/back"), 2, "write owner/name"),
    (("pull", "name", "{}/back"), 2, "write owner/name"),
    (("pull", REPO, "{}"), 2, "is not empty and is not a distill-pipe dataset"),
    (("push", "{}", REPO), 4, "it has no run.json"),
])
def test_a_mistake_is_one_line_with_the_fix(hub: Hub, dataset: Path, tmp_path: Path, monkeypatch, capsys, args, code,
                                            says) -> None:
    pushed(dataset)
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.setattr("sys.argv", ["distill-pipe", *(a.format(tmp_path) for a in args)])
    with pytest.raises(SystemExit) as done:
        main()
    told = capsys.readouterr().err
    assert (done.value.code, says in told, len(told.splitlines())) == (code, True, 1), told


def test_the_card_says_what_is_there_and_an_edited_one_stays(hub: Hub, dataset: Path, tmp_path: Path) -> None:
    pushed(dataset)
    card = hub.content(REPO, "README.md").decode()
    assert "5 of 5 shards: 10 traces" in card
    assert f'load_dataset("{REPO}", split="train"' in card
    assert "| hidden states | 5 |" in card
    (dataset / "README.md").write_text("---\nlicense: mit\n---\nmine")
    pushed(dataset)
    assert hub.content(REPO, "README.md").endswith(b"mine")
    (dataset / "README.md").write_text("---\nlicense: mit\n---\nmine too")
    pulled(dataset)
    assert (dataset / "README.md").read_text().endswith("mine too")


def test_an_object_store_is_pushed_from_and_pulled_into_like_a_folder(hub: Hub, dataset: Path, tmp_path: Path) -> None:
    pushed(dataset)
    store = f"memory://{tmp_path.name}"
    assert pulled(store).fetched == len(tree_of(dataset))
    assert pulled(store).fetched == 0
    assert verify(open_root(store)).clean
    assert collect(open_root(store), str).tokens == collect(open_root(dataset), str).tokens
    assert pushed(store, "someone/again").sent == len(tree_of(dataset))
    assert hub.repos["someone/again"].trees[-1] == hub.repos[REPO].trees[-1]


LOAD = """
import sys
from datasets import load_dataset
for config in ("default", "hidden_states"):
    print(config, load_dataset(sys.argv[1], config, split="train").num_rows)
"""


def test_load_dataset_reads_what_was_pushed(hub: Hub, dataset: Path) -> None:
    pytest.importorskip("datasets")
    pushed(dataset)
    done = subprocess.run([sys.executable, "-c", LOAD, REPO], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["default", "10", "hidden_states", "10"]
