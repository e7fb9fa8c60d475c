"""The commands that look after a dataset, as a user runs them.

Catches a repair that touches data or blesses damage, a deep verification that is not deeper, a broken store that passes
its test, and a secret on the screen.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_datasets import make_dataset

from distill_pipe import machine
from distill_pipe.cli import main
from distill_pipe.store.finalize import STATISTICS, SUCCESS, finalize
from distill_pipe.store.manifest import fragment_name, shard_name, sidecar_name
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.selftest import selftest
from distill_pipe.store.verify import verify

PROMPTS = 10
TOKENS = fragment_name(2).replace(".json", ".tokens.parquet")


@pytest.fixture
def root(tmp_path: Path) -> LocalRoot:
    """A dataset that was finalized."""
    make_dataset(tmp_path / "root", PROMPTS)
    store = LocalRoot(tmp_path / "root")
    finalize(store)
    return store


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["distill-pipe", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def all_bytes(root: LocalRoot) -> dict[str, bytes]:
    return {str(p.relative_to(root.path)): p.read_bytes() for p in sorted(root.path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("terminal", [False, True], ids=["into a pipe", "on a narrow terminal"])
def test_verify_shows_the_whole_name_of_what_is_damaged(cli, tmp_path, monkeypatch, terminal) -> None:
    folder = tmp_path / ("a long name of a folder on a shared disk " * 4).strip() / "with :smile: [bold]"
    make_dataset(folder, PROMPTS)
    damaged = folder / shard_name(1)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    monkeypatch.setenv("COLUMNS", "80")
    if terminal:
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
    code, out, _ = cli("verify", folder)
    assert code == 8
    if terminal:
        assert max(map(len, out.splitlines())) <= 80
        assert "".join(str(damaged).split()) in "".join(out.split())
    else:
        assert re.search(rf"^ +problems +{re.escape(str(damaged))} has ", out, re.MULTILINE)


def test_a_place_where_nothing_can_be_written_is_refused_before_it_is_tried_out(cli, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    code, out, err = cli("selftest", "--output", tmp_path / "file")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: .*/file/.tmp.*: Not a directory; choose another place.*\n", err)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_clean_dataset_is_deeply_clean_and_a_repair_writes_nothing(cli, root) -> None:
    before = all_bytes(root)
    code, out, _ = cli("verify", root.path, "--deep", "--repair", "--json")
    report = json.loads(out)
    assert (code, report["problems"], report["repaired"], report["traces"]) == (0, [], [], PROMPTS)
    assert all_bytes(root) == before


@pytest.mark.parametrize("name", [fragment_name(1), TOKENS, STATISTICS, SUCCESS, "manifest.parquet",
                                  "statistics/tokens.parquet"])
@pytest.mark.parametrize("damage", ["gone", "empty", "of another"])
def test_what_can_be_derived_is_made_again_as_it_was(cli, root, name: str, damage: str) -> None:
    before = all_bytes(root)
    path = root.local(name)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else before[name.replace("0000002", "0000000").replace(
            "0000001", "0000000")][:-9])
    code, out, _ = cli("verify", root.path, "--repair", "--json")
    assert (code, json.loads(out)["repaired"]) == (0, [name])
    assert all_bytes(root) == before


def test_a_fragment_that_disagrees_with_its_shard_is_a_problem_until_it_is_repaired(cli, root) -> None:
    before = all_bytes(root)
    path = root.local(fragment_name(1))
    path.write_bytes(re.sub(rb'"tokens": (\d)', rb'"tokens": 1\1', before[fragment_name(1)]))
    code, _, err = cli("verify", root.path)
    assert code == 8
    assert "1 problems" in err
    code, out, _ = cli("verify", root.path, "--repair", "--json")
    assert (code, json.loads(out)["repaired"]) == (0, [fragment_name(1)])
    assert all_bytes(root) == before


@pytest.mark.parametrize("with_fragment", [True, False])
def test_a_damaged_shard_is_neither_repaired_nor_blessed(cli, root, with_fragment: bool) -> None:
    data = root.local(shard_name(1)).read_bytes()
    root.local(shard_name(1)).write_bytes(data[:300] + bytes([data[300] ^ 4]) + data[301:])
    if not with_fragment:
        root.local(fragment_name(1)).unlink()
    before = all_bytes(root)
    code, out, _ = cli("verify", root.path, "--repair", "--json")
    report = json.loads(out)
    assert (code, len(report["problems"]), report["missing_prompts"], report["repaired"]) == (8, 1, 4, [])
    assert all_bytes(root) == before


def test_a_deep_verification_finds_wrong_measurements_that_hashes_cannot(cli, root, monkeypatch) -> None:
    """A writer that measured wrongly: hashes and records agree with each other."""
    from distill_pipe.store import commit

    measured = commit.shard_statistics
    monkeypatch.setattr(commit, "shard_statistics", lambda traces: measured(traces[1:]))
    make_dataset(root.path.parent / "wrong", PROMPTS)
    code, _, _ = cli("verify", root.path.parent / "wrong")
    assert code == 0
    code, out, _ = cli("verify", root.path.parent / "wrong", "--deep", "--json")
    problems = json.loads(out)["problems"]
    assert (code, len(problems)) == (8, 3)
    assert all("the histogram of entropy in the record is not that of the shard" in p for p in problems)


def test_a_deep_verification_compares_token_tables_and_summary(cli, root) -> None:
    root.local(TOKENS).write_bytes(root.local(TOKENS.replace("0000002", "0000001")).read_bytes())
    root.local(STATISTICS).write_bytes(root.local(STATISTICS).read_bytes().replace(b'"traces": 10', b'"traces": 11'))
    assert cli("verify", root.path)[0] == 0
    code, out, _ = cli("verify", root.path, "--deep", "--json")
    assert (code, len(json.loads(out)["problems"])) == (8, 1)


def test_gc_lists_and_deletes_only_with_delete(cli, root) -> None:
    import os

    orphan = sidecar_name("hidden_states/train", 1, "0" * 64)
    root.publish_bytes(b"12345", orphan)
    os.utime(root.local(orphan), (0, 0))
    code, out, err = cli("gc", root.path)
    assert (code, out) == (0, f"{orphan}\n")
    assert "1 files of 0.00 MB would be deleted with --delete; 0 more are younger than 24 h" in err
    assert root.size(orphan) == 5
    code, out, _ = cli("gc", root.path, "--delete", "--json")
    assert (code, json.loads(out)["files"], json.loads(out)["deleted"]) == (0, [orphan], True)
    assert root.size(orphan) is None
    assert cli("gc", root.path, "--grace", "0.5")[0] == 2


def test_a_good_place_passes_and_is_left_as_it_was(cli, tmp_path) -> None:
    code, out, _ = cli("selftest", "--output", tmp_path / "new")
    assert code == 0
    assert "FAILED" not in out
    assert [p.name for p in (tmp_path / "new").rglob("*") if p.is_file()] == []
    assert selftest(LocalRoot(tmp_path / "new")).failed == ()


def test_a_real_s3_server_passes(cli, s3_folder) -> None:
    code, out, _ = cli("selftest", "--output", s3_folder, "--json")
    assert (code, [p["name"] for p in json.loads(out)["probes"] if not p["passed"]]) == (0, [])


def test_a_store_that_breaks_its_promises_fails_with_what_it_broke(tmp_path) -> None:
    class Careless(LocalRoot):
        """Writes over what is there, and forgets to remove."""

        def create_bytes(self, data: bytes, name: str) -> bool:
            self.publish_bytes(data, name)
            return True

        def remove(self, name: str) -> None: ...

    found = selftest(Careless(tmp_path))
    assert found.failed == ("create refuses what is there", "of 4 creates at once one wins", "what was removed is gone")


def test_doctor_names_what_is_here_and_no_secret(cli, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "alsosecret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://me:password@store.example")
    code, out, err = cli("doctor")
    assert code == 0
    for secret in ("verysecret", "alsosecret", "password"):
        assert secret not in out + err
    facts = {fact["name"]: fact for fact in json.loads(cli("doctor", "--json")[1])}
    assert facts["HF_TOKEN"]["value"] == facts["AWS_SECRET_ACCESS_KEY"]["value"] == "set"
    assert facts["AWS_ENDPOINT_URL"]["value"] == "store.example"
    assert facts["python"]["value"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert int(facts["open files"]["value"]) > 0


def test_doctor_advises_where_something_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(machine, "_version", lambda name: {"vllm": "0.99.1"}.get(name))
    advice = {fact.name: fact.advice for fact in machine.examine()}
    assert "capture was tested with 0.32.x" in advice["vllm"]
    assert "ray" in advice["ray"]
    monkeypatch.setattr(machine, "_version", lambda _: None)
    assert "no engine" in {fact.name: fact.advice for fact in machine.examine()}["vllm"]


def test_repairing_in_an_object_store_works_alike(s3_folder) -> None:
    from distill_pipe.store.root import open_root

    make_dataset(s3_folder, PROMPTS)
    root = open_root(s3_folder)
    finalize(root)
    root.remove(fragment_name(1))
    root.publish_bytes(b"{}", STATISTICS)
    assert verify(root, repair=True).repaired == (fragment_name(1), STATISTICS)
    assert verify(root, deep=True).clean
