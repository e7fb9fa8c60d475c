"""Catches a summary that is made of an incomplete dataset, differs from its shards, or differs from run to run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import msgspec
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_datasets import Shape, make_dataset, start_run

from distill_pipe.errors import DamageError, MismatchError
from distill_pipe.store.commit import commit_shard
from distill_pipe.store.finalize import (
    MANIFEST,
    STATISTICS,
    SUCCESS,
    TOKENS,
    DatasetStatistics,
    Success,
    finalize,
)
from distill_pipe.store.manifest import Fragment, fragment_name, read_fragment, require_run, shard_name
from distill_pipe.store.parquet import Limit, read_table
from distill_pipe.store.root import LocalRoot, sha256_of
from distill_pipe.store.shard import QuarantinedPrompt, read_main, traces_from_table
from distill_pipe.store.statistics import TOKEN_SCHEMA, coverage, shard_statistics, token_table, token_table_name
from distill_pipe.store.status import status
from distill_pipe.store.trace import Trace

SHAPE = Shape(layers=(1, 4))
FILES = (TOKENS, MANIFEST, STATISTICS, SUCCESS)
SHARDS = 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete dataset of three shards; nobody writes to it."""
    path = tmp_path_factory.mktemp("whole") / "dataset"
    make_dataset(path, 10, SHAPE)
    return path


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> LocalRoot:
    shutil.copytree(whole, tmp_path / "dataset")
    return LocalRoot(tmp_path / "dataset")


def token_path(root: LocalRoot, shard: int) -> Path:
    return root.local(token_table_name(fragment_name(shard)))


def fragments(root: LocalRoot) -> list[Fragment]:
    found = [read_fragment(root, shard) for shard in range(SHARDS)]
    return [f for f in found if f is not None]


def stored_traces(root: LocalRoot) -> list[Trace]:
    capture = require_run(root).spec.capture
    return [trace for f in fragments(root)
            for trace in traces_from_table(read_main(root.local(f.file.name), f.info, capture))]


def contents(root: LocalRoot) -> list[bytes | None]:
    return [root.read(name) for name in FILES]


def test_an_incomplete_dataset_is_refused_and_nothing_is_written(root: LocalRoot) -> None:
    for shard in (0, 2):
        root.local(shard_name(shard)).unlink()
    with pytest.raises(DamageError, match="2 of 3 shards are missing"):
        finalize(root)
    assert contents(root) == [None] * 4


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="not a distill-pipe dataset"):
        finalize(LocalRoot(tmp_path))


def test_running_again_writes_the_same_bytes(root: LocalRoot) -> None:
    first, before = finalize(root), contents(root)
    assert finalize(root) == first
    assert contents(root) == before
    for name in FILES:
        root.local(name).unlink()
    assert finalize(root) == first
    assert contents(root) == before


def test_the_mark_of_success_is_written_last(root: LocalRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    published = []
    publish = LocalRoot.publish
    monkeypatch.setattr(LocalRoot, "publish", lambda self, source, name: (published.append(name),
                                                                          publish(self, source, name)))
    finalize(root)
    assert published == list(FILES)


def test_the_files_written_are_the_files_reported(root: LocalRoot) -> None:
    final, run = finalize(root), require_run(root)
    assert [ref.name for ref in final.files] == list(FILES)
    assert [ref.sha256 for ref in final.files] == [sha256_of(root.local(name)) for name in FILES]
    assert msgspec.json.decode(root.local(STATISTICS).read_bytes(), type=DatasetStatistics) == final.statistics
    assert msgspec.json.decode(root.read(SUCCESS) or b"", type=Success) == Success(fingerprint=run.fingerprint)
    for name in (TOKENS, MANIFEST):
        assert run.fingerprint in pq.read_metadata(root.local(name)).metadata[b"distill_pipe"].decode()


def test_a_dataset_that_was_not_finalized_has_no_statistics(root: LocalRoot) -> None:
    assert root.size(STATISTICS) is None


def test_the_summary_is_that_of_all_stored_traces(root: LocalRoot) -> None:
    found, traces, facts = finalize(root), stored_traces(root), status(root)
    totals = found.statistics
    assert found.recounted == 0
    assert (totals.shards, totals.prompts, totals.traces, totals.tokens, totals.rows, totals.bytes) == (
        SHARDS, 10, len(traces), facts.tokens, facts.rows, facts.bytes)
    assert totals.tail_mass_mean == pytest.approx(facts.tail_mass_mean)
    assert totals.statistics == shard_statistics(traces)
    table = token_table(traces, SHAPE.vocab_size)
    tokens = read_table(root.local(TOKENS), TOKEN_SCHEMA, dict.fromkeys(TOKEN_SCHEMA.names, Limit(SHAPE.vocab_size)))
    assert tokens.select(["token_id", "count"]).equals(table.select(["token_id", "count"]))
    np.testing.assert_allclose(tokens["mass"], table["mass"], rtol=1e-6)
    assert totals.coverage == coverage(tokens, facts.rows)


def test_errors_of_shards_are_merged_by_their_rows(root: LocalRoot) -> None:
    found, measured = finalize(root).statistics, [f.info.measured for f in fragments(root)]
    rows = [f.info.rows for f in fragments(root)]
    assert found.head_tv_error_max == max(m.head_tv_error_max for m in measured)
    assert found.head_tv_error_mean == pytest.approx(np.average([m.head_tv_error_mean for m in measured], weights=rows))
    assert [h.layer for h in found.hidden] == [1, 4]
    for merged in found.hidden:
        errors = [h for m in measured for h in m.hidden if h.layer == merged.layer]
        weights = [h.rows for h in errors]
        assert (merged.rows, merged.max) == (sum(weights), max(h.max for h in errors))
        assert merged.mean == pytest.approx(np.average([h.mean for h in errors], weights=weights))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)


def take_another(path: Path) -> None:
    shutil.copy(path.with_name("0000001.tokens.parquet"), path)


def write_columns(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path, use_dictionary=False, write_page_checksum=True)


def reverse(path: Path) -> None:
    write_columns(path, lambda table: table[::-1])


def move_beyond_the_vocabulary(path: Path) -> None:
    write_columns(path, lambda table: table.set_column(0, "token_id", pa.array(
        np.arange(table.num_rows, dtype=np.int32) + SHAPE.vocab_size)))


def drop_a_mass(path: Path) -> None:
    write_columns(path, lambda table: table.set_column(2, "mass", pa.array(
        [None, *table["mass"].to_pylist()[1:]], pa.float64())))


def lose_mass_to_nan(path: Path) -> None:
    write_columns(path, lambda table: table.set_column(2, "mass", pa.array([float("nan")] * table.num_rows)))


@pytest.mark.parametrize("harm", [Path.unlink, cut, flip, take_another, reverse, move_beyond_the_vocabulary,
                                  drop_a_mass, lose_mass_to_nan])
def test_a_token_table_that_is_missing_or_cannot_be_true_is_counted_again(
        root: LocalRoot, harm: Callable[[Path], None]) -> None:
    first, before = finalize(root), contents(root)
    assert first.recounted == 0
    harm(token_path(root, 0))
    again = finalize(root)
    assert (again.recounted, again.statistics) == (1, first.statistics)
    assert contents(root) == before


def test_a_main_shard_that_cannot_be_counted_is_reported_as_damage(root: LocalRoot) -> None:
    token_path(root, 1).unlink()
    cut(root.local(shard_name(1)))
    with pytest.raises(DamageError, match="shard-0000001"):
        finalize(root)
    assert contents(root) == [None] * 4


def test_missing_fragments_change_nothing(root: LocalRoot) -> None:
    finalize(root)
    before = contents(root)
    for shard in range(SHARDS):
        root.local(fragment_name(shard)).unlink()
    finalize(root)
    assert contents(root) == before


def test_a_dataset_whose_prompts_were_all_given_up_on_can_be_finalized(tmp_path: Path) -> None:
    root = LocalRoot(tmp_path / "dataset")
    run = start_run(root.path, 2, SHAPE)
    commit_shard(root, run, 0, [], [QuarantinedPrompt(i, f"prompt-{i}", "engine", "refused") for i in range(2)])
    found = finalize(root).statistics
    assert (found.quarantined, found.traces, found.rows, found.tail_mass_mean, found.hidden) == (2, 0, 0, 0, ())
    assert {(c.tokens, c.mass) for c in found.coverage} == {(0, 0)}
    manifest = pq.read_table(root.local(MANIFEST)).to_pylist()
    assert [(row["hidden_name"], row["quarantine_size"] > 0) for row in manifest] == [(None, True)]


def test_readers_without_this_package_find_every_file_by_the_manifest(root: LocalRoot) -> None:
    finalize(root)
    rows = duckdb.read_parquet(str(root.local(MANIFEST))).project(
        "shard, name, sha256, hidden_name, hidden_sha256, quarantine_name, rows").fetchall()
    assert [row[0] for row in rows] == list(range(SHARDS))
    for fragment, (_, name, digest, hidden_name, hidden_digest, quarantine_name, count) in zip(
            fragments(root), rows, strict=True):
        assert (digest, hidden_digest) == (sha256_of(root.local(name)), sha256_of(root.local(hidden_name)))
        assert (quarantine_name, count) == (None, fragment.info.rows)
    assert polars.read_parquet(root.local(MANIFEST))["shard"].to_list() == [0, 1, 2]


def test_readers_without_this_package_find_the_tokens(root: LocalRoot) -> None:
    facts = finalize(root).statistics
    for name in (TOKENS, token_table_name(fragment_name(0))):
        tokens = read_table(root.local(name), TOKEN_SCHEMA, dict.fromkeys(TOKEN_SCHEMA.names, Limit(SHAPE.vocab_size)))
        wanted = [tuple(row.values()) for row in tokens.to_pylist()]
        assert duckdb.read_parquet(str(root.local(name))).fetchall() == wanted
        assert polars.read_parquet(root.local(name)).rows() == wanted
    total, = duckdb.read_parquet(str(root.local(TOKENS))).aggregate("sum(count), sum(mass)").fetchall()
    assert total == (facts.rows, pytest.approx(facts.rows, rel=1e-6))
