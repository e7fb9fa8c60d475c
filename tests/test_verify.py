"""Catches a `verify` that calls damage clean, blames the wrong file, or writes; and a `status` that miscounts."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest
from tiny_datasets import Shape, make_dataset, random_trace, start_run

from distill_pipe.errors import MismatchError
from distill_pipe.store.commit import commit_shard
from distill_pipe.store.hidden_codec import encode_trace
from distill_pipe.store.manifest import RUN, FileRef, Fragment, encode_record, fragment_name, read_fragment, shard_name
from distill_pipe.store.parquet_writer import write_table
from distill_pipe.store.root import LocalRoot, sha256_of
from distill_pipe.store.shard import QuarantinedPrompt, write_main
from distill_pipe.store.status import status
from distill_pipe.store.verify import verify

PROMPTS = 10
PLAN = "plan/part-0000.parquet"


@pytest.fixture
def root(tmp_path: Path) -> LocalRoot:
    make_dataset(tmp_path / "out", PROMPTS)
    return LocalRoot(tmp_path / "out")


def fragment(root: LocalRoot, shard: int) -> Fragment:
    found = read_fragment(root, shard)
    assert found is not None
    return found


def sidecar(root: LocalRoot, shard: int) -> Path:
    hidden = fragment(root, shard).info.hidden
    assert hidden is not None
    return root.local(hidden.name)


def change_byte(path: Path, at: int = -200) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def swap(a: Path, b: Path) -> None:
    kept = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(kept)


def only_problem(root: LocalRoot) -> str:
    report = verify(root)
    assert not report.clean
    assert len(report.problems) == 1, report.problems
    return report.problems[0]


def test_a_clean_dataset_is_clean_and_its_numbers_are_right(root: LocalRoot) -> None:
    traces = [random_trace(i) for i in range(PROMPTS)]
    report = verify(root)
    assert report.clean
    assert (report.problems, report.orphans) == ((), ())
    assert (report.shards, report.shards_found, report.prompts, report.traces) == (3, 3, PROMPTS, PROMPTS)
    assert (report.missing_prompts, report.doubled_prompts, report.quarantined) == (0, 0, 0)
    assert report.tokens == sum(t.num_tokens for t in traces)
    assert report.rows == sum(t.num_rows for t in traces)


def test_a_missing_shard_leaves_its_prompts_missing(root: LocalRoot) -> None:
    root.local(shard_name(1)).unlink()
    report = verify(root)
    assert not report.clean
    assert (report.shards_found, report.missing_prompts, report.traces) == (2, 4, 6)
    assert report.orphans == (str(sidecar(root, 1).relative_to(root.path)),)


def test_a_deleted_sidecar_is_named(root: LocalRoot) -> None:
    path = sidecar(root, 2)
    path.unlink()
    assert only_problem(root) == f"{path} is missing"


@pytest.mark.parametrize("at", [5, 300, -200, -1])
def test_a_changed_byte_anywhere_in_a_shard_is_named(root: LocalRoot, at: int) -> None:
    change_byte(root.local(shard_name(0)), at)
    assert only_problem(root) == f"{root.local(shard_name(0))} has changed: its sha256 is not the one recorded"


@pytest.mark.parametrize("at", [5, -200, -1])
def test_a_changed_byte_anywhere_in_a_sidecar_is_named(root: LocalRoot, at: int) -> None:
    change_byte(sidecar(root, 1), at)
    assert f"{sidecar(root, 1)} has changed" in only_problem(root)


def test_a_changed_byte_is_found_without_fragments_too(root: LocalRoot) -> None:
    root.local(fragment_name(0)).unlink()
    change_byte(root.local(shard_name(0)), 300)
    assert str(root.local(shard_name(0))) in only_problem(root)


def test_a_shortened_shard_is_named_with_both_sizes(root: LocalRoot) -> None:
    path = root.local(shard_name(2))
    size = path.stat().st_size
    os.truncate(path, size - 7)
    assert only_problem(root) == f"{path} has {size - 7} bytes, expected {size}"


@pytest.mark.parametrize("with_fragments", [True, False])
def test_swapped_shards_are_both_named(root: LocalRoot, with_fragments: bool) -> None:
    paths = [root.local(shard_name(shard)) for shard in (0, 1)]
    swap(*paths)
    if not with_fragments:
        for shard in (0, 1):
            root.local(fragment_name(shard)).unlink()
    report = verify(root)
    assert not report.clean
    assert report.missing_prompts == 8
    assert len(report.problems) == 2
    assert all(str(path) in problem for path, problem in zip(paths, report.problems, strict=True))


def test_swapped_fragments_are_seen_through(root: LocalRoot) -> None:
    swap(root.local(fragment_name(0)), root.local(fragment_name(1)))
    assert verify(root).clean


def test_swapped_sidecars_are_both_named(root: LocalRoot) -> None:
    swap(sidecar(root, 0), sidecar(root, 1))
    report = verify(root)
    assert [str(sidecar(root, i)) in p for i, p in enumerate(report.problems)] == [True, True]


def test_a_fragment_that_points_to_another_shards_sidecar_is_found(root: LocalRoot) -> None:
    own, other = fragment(root, 0), fragment(root, 1)
    mixed = msgspec.structs.replace(own, info=msgspec.structs.replace(own.info, hidden=other.info.hidden))
    root.local(fragment_name(0)).write_bytes(encode_record(mixed))
    assert only_problem(root) == f"{root.local(shard_name(0))}: its footer and its fragment disagree"


def test_a_shard_of_another_run_is_named(root: LocalRoot, tmp_path: Path) -> None:
    make_dataset(tmp_path / "other", PROMPTS, Shape(top_k=7))
    for name in (shard_name(0), fragment_name(0)):
        shutil.copy(tmp_path / "other" / name, root.local(name))
    assert f"{root.local(shard_name(0))} belongs to another run" in only_problem(root)


def test_a_shard_beyond_the_plan_is_reported(root: LocalRoot) -> None:
    shutil.copy(root.local(shard_name(0)), root.local(shard_name(3)))
    assert only_problem(root) == "shard 3 is not in the plan, which ends at shard 2"


def test_a_whole_and_well_hashed_shard_that_lacks_a_prompt_is_reported(root: LocalRoot) -> None:
    path, own = root.local(shard_name(0)), fragment(root, 0)
    kept = pq.read_table(path).slice(0, 3)
    sidecar = root.local(own.info.hidden.name) if own.info.hidden else None
    assert sidecar is not None
    write_table(sidecar, pq.read_table(sidecar).slice(0, 3))
    hidden = FileRef(name=str(sidecar.relative_to(root.path)), sha256=sha256_of(sidecar), size=sidecar.stat().st_size)
    info = msgspec.structs.replace(own.info, hidden=hidden, traces=3, tokens=sum(map(len, kept["token_ids"])),
                                   rows=sum(map(len, kept["logsumexp"])), lengths=tuple(map(len, kept["token_ids"])))
    write_main(path, kept, info)
    ref = FileRef(name=own.file.name, sha256=sha256_of(path), size=path.stat().st_size)
    root.local(fragment_name(0)).write_bytes(encode_record(Fragment(file=ref, info=info)))
    assert "not exactly those of its plan" in only_problem(root)


def test_a_stranger_among_the_shards_is_reported(root: LocalRoot) -> None:
    name = shard_name(0).replace(".parquet", " (copy).parquet")
    shutil.copy(root.local(shard_name(0)), root.local(name))
    assert f"{root.local(name)} is not a shard" in only_problem(root)


@pytest.mark.parametrize("edit", [(b'"top_k": 8', b'"top_k": 9'), (b'"prompts": 10', b'"prompts": 9')])
def test_an_edited_run_is_refused(root: LocalRoot, edit: tuple[bytes, bytes]) -> None:
    text = root.local(RUN).read_bytes()
    assert edit[0] in text
    root.local(RUN).write_bytes(text.replace(*edit))
    for look in (verify, status):
        with pytest.raises(MismatchError, match=r"run\.json was edited"):
            look(root)


def test_a_run_of_another_format_version_is_refused_with_both_versions(root: LocalRoot) -> None:
    text = root.local(RUN).read_bytes()
    root.local(RUN).write_bytes(text.replace(b'"format_version": 1', b'"format_version": 2'))
    with pytest.raises(MismatchError, match="format version 2; this distill-pipe reads version 1"):
        verify(root)


@pytest.mark.parametrize("look", [verify, status])
def test_a_folder_without_a_dataset_is_refused(tmp_path: Path, look: Callable[[LocalRoot], object]) -> None:
    with pytest.raises(MismatchError, match=r"is not a distill-pipe dataset: it has no run\.json"):
        look(LocalRoot(tmp_path / "nothing"))


def test_a_plan_of_another_run_is_named(root: LocalRoot, tmp_path: Path) -> None:
    start_run(tmp_path / "other", PROMPTS + 2)
    shutil.copy(tmp_path / "other" / PLAN, root.local(PLAN))
    assert str(root.local(PLAN)) in only_problem(root)


def test_a_missing_plan_is_named(root: LocalRoot) -> None:
    root.local(PLAN).unlink()
    assert only_problem(root) == f"{root.local(PLAN)} is missing"


def test_an_orphan_sidecar_is_reported_but_is_no_problem(root: LocalRoot) -> None:
    orphan = sidecar(root, 0).with_name("shard-0000000-00000000.parquet")
    shutil.copy(sidecar(root, 0), orphan)
    report = verify(root)
    assert report.clean
    assert report.orphans == (str(orphan.relative_to(root.path)),)


def test_every_problem_is_reported_not_only_the_first(root: LocalRoot) -> None:
    change_byte(root.local(shard_name(0)))
    sidecar(root, 1).unlink()
    root.local(PLAN).unlink()
    report = verify(root)
    assert len(report.problems) == 3
    assert report.missing_prompts == 8


def test_verify_and_status_write_nothing_even_where_fragments_are_missing(root: LocalRoot) -> None:
    root.local(fragment_name(1)).unlink()
    before = sorted(root.path.rglob("*"))
    assert verify(root).clean
    status(root)
    assert sorted(root.path.rglob("*")) == before


def test_status_counts_what_is_committed(tmp_path: Path) -> None:
    run, root = start_run(tmp_path, PROMPTS), LocalRoot(tmp_path)
    empty = status(root)
    assert (empty.shards, empty.shards_done, empty.complete, empty.tail_mass_mean) == (3, 0, False, None)
    assert (empty.traces, empty.rows, empty.bytes, empty.eta_seconds) == (0, 0, 0, None)
    traces = [random_trace(o) for o in (0, 1, 3)]
    encoded = [encode_trace(t, run.spec.capture.hidden_codec) for t in traces]
    commit_shard(root, run, 0, encoded, [QuarantinedPrompt(2, "p", "engine", "no")])
    one = status(root)
    assert (one.shards_done, one.traces, one.quarantined, one.prompts) == (1, 3, 1, PROMPTS)
    assert one.rows == sum(t.num_rows for t in traces)
    assert one.tokens == sum(t.num_tokens for t in traces)
    mass = sum(float(t.tail_mass_R.sum()) for t in traces) / one.rows
    assert one.tail_mass_mean == pytest.approx(mass, rel=1e-5)
    stored = [p for folder in ("data", "hidden_states", "_quarantine") for p in (tmp_path / folder).rglob("*.parquet")]
    assert len(stored) == 3
    assert one.bytes == sum(p.stat().st_size for p in stored)


def test_status_forecasts_from_the_times_of_commits(root: LocalRoot) -> None:
    assert (status(root).complete, status(root).eta_seconds) == (True, None)
    root.local(shard_name(2)).unlink()
    for shard, when in ((0, 1000.0), (1, 1060.0)):
        os.utime(root.local(shard_name(shard)), (when, when))
    half = status(root)
    assert (half.shards_done, half.complete) == (2, False)
    assert half.eta_seconds == pytest.approx(60)
