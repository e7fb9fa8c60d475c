"""Catches a plan that gives a shard other prompts than its own, loses their text, or is damaged and read anyway."""

from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_datasets import Shape, start_run

from distill_pipe.errors import MismatchError
from distill_pipe.store import plan as plan_module
from distill_pipe.store.manifest import FileRef, Run
from distill_pipe.store.plan import (
    Message,
    PlannedPrompt,
    num_shards,
    read_planned_shard,
    shard_range,
    write_plan_part,
)
from distill_pipe.store.root import LocalRoot, sha256_of

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
messages = st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), texts)
conversations = st.lists(messages, min_size=1, max_size=4).map(tuple)


def run_of(folder: Path, num_prompts: int, prompts_per_shard: int) -> Run:
    return start_run(folder, num_prompts, Shape(prompts_per_shard=prompts_per_shard))


def replace_plan(root: Path, run: Run, prompts: list[PlannedPrompt]) -> Run:
    """The run with its plan files replaced by ones that hold `prompts`."""
    size, shards_per_part = run.spec.prompts_per_shard, plan_module.SHARDS_PER_PART
    parts = []
    for number, first in enumerate(range(0, len(prompts), size * shards_per_part)):
        held = prompts[first:first + size * shards_per_part]
        path = root / f"plan/part-{number}.parquet"
        write_plan_part(path, [held[i:i + size] for i in range(0, len(held), size)])
        parts.append(FileRef(name=f"plan/part-{number}.parquet", sha256=sha256_of(path), size=path.stat().st_size))
    return msgspec.structs.replace(run, plan=tuple(parts))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(texts, st.none() | texts, conversations), min_size=1, max_size=12), st.integers(1, 5))
def test_prompts_come_back_from_the_plan_as_they_were(content: list[tuple[str, str | None, tuple[Message, ...]]],
                                                      size: int) -> None:
    prompts = [PlannedPrompt(i, *fields) for i, fields in enumerate(content)]
    with TemporaryDirectory() as folder:
        run = replace_plan(Path(folder), run_of(Path(folder), len(prompts), size), prompts)
        found = [read_planned_shard(LocalRoot(folder), run, shard) for shard in range(num_shards(run))]
    assert [p for held in found for p in held] == prompts
    assert all(len(held) == size for held in found[:-1])


@pytest.mark.parametrize(("num_prompts", "size"), [(1, 1), (1, 64), (64, 64), (65, 64), (10, 3), (7, 1)])
def test_shard_i_holds_ordinals_from_i_times_n(tmp_path: Path, num_prompts: int, size: int) -> None:
    run = run_of(tmp_path, num_prompts, size)
    covered = []
    for shard in range(num_shards(run)):
        held = [p.ordinal for p in read_planned_shard(LocalRoot(tmp_path), run, shard)]
        assert held == list(range(*shard_range(run, shard)))
        assert held[0] == shard * size
        covered += held
    assert covered == list(range(num_prompts))


def test_a_plan_of_several_parts_is_read_from_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "SHARDS_PER_PART", 3)
    prompts = [PlannedPrompt(i, f"p{i}", None, (Message("user", f"text {i}"),)) for i in range(17)]
    run = replace_plan(tmp_path, run_of(tmp_path, 17, 2), prompts)
    assert len(run.plan) == 3
    for shard in range(num_shards(run)):
        assert read_planned_shard(LocalRoot(tmp_path), run, shard) == prompts[slice(*shard_range(run, shard))]


def test_any_changed_byte_of_a_plan_page_is_found(tmp_path: Path) -> None:
    run, root = run_of(tmp_path, 10, 4), LocalRoot(tmp_path)
    path = root.local(run.plan[0].name)
    data, whole = path.read_bytes(), [read_planned_shard(root, run, shard) for shard in range(3)]
    found = 0
    for at in range(4, len(data), 3):
        changed = bytearray(data)
        changed[at] ^= 0x20
        path.write_bytes(changed)
        try:
            assert [read_planned_shard(root, run, shard) for shard in range(3)] == whole, at
        except MismatchError:
            found += 1
    assert found > len(data) / 3 / 4


@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(), lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"junk" * 9),
    lambda path: path.write_bytes(path.read_bytes()[:-5]),
    lambda path: pq.write_table(pa.table({"text": ["a", "b"]}), path),
    lambda path: pq.write_table(pq.read_table(path).slice(0, 3), path)])
def test_a_plan_that_is_gone_damaged_or_foreign_is_refused_by_name(tmp_path: Path, damage) -> None:
    run, root = run_of(tmp_path, 10, 4), LocalRoot(tmp_path)
    damage(root.local(run.plan[0].name))
    with pytest.raises(MismatchError, match=r"plan/part-0000\.parquet"):
        read_planned_shard(root, run, 0)


def test_a_plan_with_other_ordinals_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, 4, 4)
    for ordinals in ([1, 2, 3, 4], [0, 1, 2], [0, 2, 1, 3], [0, 1, 1, 3]):
        prompts = [PlannedPrompt(o, "p", None, (Message("user", "x"),)) for o in ordinals]
        with pytest.raises(MismatchError, match="shard 0 does not hold prompts 0 to 3"):
            read_planned_shard(LocalRoot(tmp_path), replace_plan(tmp_path, run, prompts), 0)
