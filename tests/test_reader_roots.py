"""Catches a reader that knows only folders: other places, and the way of a reader into a worker process."""

import time
from pathlib import Path

import pytest
from tiny_datasets import make_dataset
from torch.utils.data import DataLoader

from distill_pipe.consume import Batch, ShardDataset, ShardReader
from distill_pipe.errors import DamageError, UsageError
from distill_pipe.store.manifest import Fragment, shard_name
from distill_pipe.store.root import Root, open_root

PROMPTS = 10


def ordinals(batches: ShardReader | DataLoader[Batch]) -> list[list[int]]:
    return [batch.ordinals_B.tolist() for batch in batches]


@pytest.fixture
def order(tmp_path: Path) -> list[list[int]]:
    make_dataset(tmp_path, PROMPTS)
    return ordinals(ShardReader(tmp_path, batch_tokens=40))


def test_a_dataset_in_memory_reads_like_one_in_a_folder(order: list[list[int]], request: pytest.FixtureRequest) -> None:
    root = f"memory://{request.node.name}"
    make_dataset(root, PROMPTS)
    assert ordinals(ShardReader(root, layers=(1,), batch_tokens=40)) == order
    assert ordinals(ShardReader(open_root(root), batch_tokens=40)) == order
    assert ShardDataset(root, layers=(2,))[7].ordinals_B.tolist() == [7]


def test_a_reader_and_its_workers_read_an_object_store(order: list[list[int]], s3_folder: str) -> None:
    make_dataset(s3_folder, PROMPTS)
    reader = ShardReader(s3_folder, layers=(1,), batch_tokens=40)
    assert ordinals(reader) == order
    loader = DataLoader(reader, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert ordinals(loader) == order
    open_root(s3_folder).remove(shard_name(1))
    with pytest.raises(DamageError, match=f"{s3_folder}/{shard_name(1)} is missing"):
        ordinals(reader)


def test_a_forked_worker_says_what_to_do_instead_of_waiting_for_ever(s3_folder: str) -> None:
    make_dataset(s3_folder, 2)
    loader = DataLoader(ShardReader(s3_folder), batch_size=None, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(UsageError, match='multiprocessing_context="spawn"'):
        ordinals(loader)


def test_records_are_looked_up_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill_pipe.consume import opened
    make_dataset(tmp_path, 24)
    asked: list[set[int]] = []
    busy: set[int] = set()
    real = opened.read_fragment

    def slow(root: Root, shard: int) -> Fragment | None:
        busy.add(shard)
        time.sleep(0.02)
        asked.append(set(busy))
        busy.discard(shard)
        return real(root, shard)

    monkeypatch.setattr(opened, "read_fragment", slow)
    assert ShardReader(tmp_path).num_traces() == 24
    assert max(map(len, asked)) > 3
    asked.clear()
    next(iter(ShardReader(tmp_path, dp_rank=1, dp_world=5, batch_tokens=20)))
    assert max(map(len, asked)) > 3
    asked.clear()
    assert len(ShardDataset(tmp_path)) == 24
    assert max(map(len, asked)) > 3
