"""Catches ranks and workers that train on a trace twice, miss one, fall out of step, or resume elsewhere.

The order itself is tested in `test_order`; here it is files, threads, processes and saved states.
"""

import json
import pickle
import threading
from collections import Counter
from itertools import islice, zip_longest
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import reading_rank
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_group import run_ranks
from tiny_datasets import Shape, make_dataset
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from distill_pipe.consume import Batch, ShardReader
from distill_pipe.errors import DamageError, MismatchError, UsageError
from distill_pipe.store.manifest import read_fragment, shard_name
from distill_pipe.store.root import LocalRoot

# Three workers on two cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

PROMPTS = 22


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "dataset"
    make_dataset(path, PROMPTS, Shape(prompts_per_shard=3))
    return path


def ordinals(batch: Batch) -> list[int]:
    return [] if batch.is_padding else batch.ordinals_B.tolist()


def steps_of(reader: ShardReader, stop: int | None = None) -> list[list[int]]:
    return [ordinals(batch) for batch in islice(reader, stop)]


def flat(ranks: list[list[list[int]]]) -> list[int]:
    return [o for rank in ranks for step in rank for o in step]


@settings(max_examples=20, deadline=None)
@given(budget=st.integers(10, 60), before=st.integers(1, 9), after=st.integers(1, 9), stop=st.integers(0, 6),
       threads=st.integers(0, 2), interleave=st.integers(1, 2), epoch=st.integers(0, 2))
def test_a_state_saved_at_one_world_size_is_gone_on_from_at_another(
        root: Path, budget: int, before: int, after: int, stop: int, threads: int, interleave: int,
        epoch: int) -> None:
    seen, states = [], []
    for rank in range(before):
        reader = ShardReader(root, batch_tokens=budget, epoch=epoch, dp_rank=rank, dp_world=before, threads=threads,
                             interleave=interleave)
        seen.append(steps_of(reader, stop))
        states.append(json.loads(json.dumps(reader.state_dict())))
    assert all(state == states[0] for state in states)
    rest = []
    for rank in range(after):
        reader = ShardReader(root, batch_tokens=budget, dp_rank=rank, dp_world=after, interleave=interleave)
        reader.load_state_dict(states[0])
        rest.append(steps_of(reader))
    assert len({len(rank) for rank in rest}) == 1
    assert Counter(flat(seen) + flat(rest)) == Counter(range(PROMPTS))
    if before == after:
        whole = [steps_of(ShardReader(root, batch_tokens=budget, epoch=epoch, dp_rank=rank, dp_world=before,
                                      interleave=interleave)) for rank in range(before)]
        assert [a + b for a, b in zip(seen, rest, strict=True)] == whole


def test_more_ranks_than_shards_take_equal_steps_and_the_last_ones_are_padding(root: Path) -> None:
    ranks = [list(ShardReader(root, layers=(1,), batch_tokens=200, dp_rank=rank, dp_world=12)) for rank in range(12)]
    assert {len(rank) for rank in ranks} == {1}
    padding = [rank[0] for rank in ranks if rank[0].is_padding]
    assert padding
    for batch in padding:
        assert len(batch.rows_R) == len(batch.target) == 0
        assert batch.hidden[1].shape == (1, 8)
        assert not batch.loss_mask_T.any()
        assert batch.padded().attention_mask_BT.shape == (1, 1)
    assert sorted(flat([[ordinals(batch) for batch in rank] for rank in ranks])) == list(range(PROMPTS))


def test_the_steps_of_an_epoch_are_known_without_reading_it(root: Path) -> None:
    for rank in range(3):
        reader = ShardReader(root, batch_tokens=40, dp_rank=rank, dp_world=3, split="train")
        assert reader.num_steps() == len(list(reader))


def test_iterating_again_repeats_the_epoch_and_set_epoch_goes_to_another(root: Path) -> None:
    reader = ShardReader(root, batch_tokens=40)
    first = steps_of(reader)
    assert steps_of(reader) == first
    reader.set_epoch(1)
    assert steps_of(reader) == steps_of(ShardReader(root, batch_tokens=40, epoch=1)) != first


def test_a_loaded_state_holds_for_one_iteration_and_its_epoch_is_kept(root: Path) -> None:
    saved = ShardReader(root, batch_tokens=40, epoch=2)
    whole = steps_of(saved)
    steps_of(saved, 3)
    reader = ShardReader(root, batch_tokens=40)
    reader.load_state_dict(saved.state_dict())
    assert reader.state_dict() == saved.state_dict()
    assert reader.epoch == 2
    # As trainers do at the start of every epoch.
    reader.set_epoch(2)
    assert steps_of(reader) == whole[3:]
    assert steps_of(reader) == whole


def by_workers(reader: ShardReader, workers: int) -> list[Batch]:
    """What a DataLoader makes of that many workers, in one process: it asks them by turns."""
    lanes = []
    for worker in range(workers):
        told = SimpleNamespace(id=worker, num_workers=workers)
        with patch("distill_pipe.consume.reader.get_worker_info", lambda told=told: told):
            lanes.append(list(pickle.loads(pickle.dumps(reader))))  # noqa: S301 - as a worker gets it
    return [batch for turn in zip_longest(*lanes) for batch in turn if batch is not None]


@settings(max_examples=25, deadline=None)
@given(budget=st.integers(10, 60), rank=st.integers(0, 2), workers=st.integers(1, 5), later=st.integers(1, 5),
       stop=st.integers(1, 6), interleave=st.integers(1, 3))
def test_any_number_of_workers_keeps_the_order_and_may_change_in_the_middle(
        root: Path, budget: int, rank: int, workers: int, later: int, stop: int, interleave: int) -> None:
    reader = ShardReader(root, batch_tokens=budget, dp_rank=rank, dp_world=3, threads=0, interleave=interleave)
    whole = steps_of(reader)
    batches = by_workers(reader, workers)
    assert [ordinals(batch) for batch in batches] == whole
    for batch in batches[stop - 1:stop]:
        resumed = ShardReader(root, batch_tokens=budget, dp_rank=rank, dp_world=3, threads=0, interleave=interleave)
        resumed.load_state_dict(batch.state_dict())
        assert [ordinals(rest) for rest in by_workers(resumed, later)] == whole[stop:]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_keep_the_order_of_one_process_over_epochs(root: Path, context: str) -> None:
    reader = ShardReader(root, layers=(2,), batch_tokens=30, dp_rank=1, dp_world=2)
    wholes = [steps_of(reader.at_epoch(epoch)) for epoch in range(2)]
    loader = DataLoader(reader, batch_size=None, num_workers=3, multiprocessing_context=context,
                        persistent_workers=True)
    for epoch, whole in enumerate(wholes):
        reader.set_epoch(epoch)
        batches = list(loader)
        assert [ordinals(batch) for batch in batches] == whole
        assert all(batch.hidden[2].dtype == torch.bfloat16 for batch in batches)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_state_of_a_batch_resumes_at_another_number_of_workers(root: Path, workers: int) -> None:
    whole = steps_of(ShardReader(root, batch_tokens=30))
    loader = DataLoader(ShardReader(root, batch_tokens=30), batch_size=None, num_workers=2)
    *_, last = islice(loader, 5)
    resumed = ShardReader(root, batch_tokens=30)
    resumed.load_state_dict(last.state_dict())
    again = DataLoader(resumed, batch_size=None, num_workers=workers)
    assert [ordinals(batch) for batch in again] == whole[5:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_stateful_data_loader_resumes_where_it_was(root: Path, workers: int) -> None:
    def loader() -> StatefulDataLoader[Batch]:
        return StatefulDataLoader(ShardReader(root, batch_tokens=30), batch_size=None, num_workers=workers)
    whole = [ordinals(batch) for batch in loader()]
    first = loader()
    seen = [ordinals(batch) for batch in islice(first, 3)]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert seen + [ordinals(batch) for batch in second] == whole


def test_a_state_of_another_dataset_or_of_other_settings_is_refused(root: Path, tmp_path: Path) -> None:
    state = ShardReader(root).state_dict()
    make_dataset(tmp_path, 3)
    with pytest.raises(MismatchError, match="another dataset"):
        ShardReader(tmp_path).load_state_dict(state)
    with pytest.raises(MismatchError, match="batch_tokens: saved 8192, given 100"):
        ShardReader(root, batch_tokens=100).load_state_dict(state)
    with pytest.raises(MismatchError, match="no reader's state"):
        ShardReader(root).load_state_dict({"epoch": 3})
    with pytest.raises(MismatchError, match="version 9"):
        ShardReader(root).load_state_dict(state | {"version": 9})


def test_a_state_goes_on_over_its_own_shards_while_the_dataset_grows(tmp_path: Path) -> None:
    make_dataset(tmp_path, 8)
    late = tmp_path / shard_name(1)
    kept = late.read_bytes()
    late.unlink()
    reader = ShardReader(tmp_path, batch_tokens=1)
    seen = steps_of(reader, 2)
    late.write_bytes(kept)
    resumed = ShardReader(tmp_path, batch_tokens=1)
    resumed.load_state_dict(reader.state_dict())
    assert sorted(flat([seen, steps_of(resumed)])) == [0, 1, 2, 3]
    late.unlink()
    fresh = ShardReader(tmp_path)
    late.write_bytes(kept)
    both = ShardReader(tmp_path).state_dict()
    with pytest.raises(DamageError, match="shards \\[1\\] were there"):
        fresh.load_state_dict(both)


@pytest.mark.parametrize("settings", [{"dp_rank": 2, "dp_world": 2}, {"dp_rank": -1}, {"interleave": 0},
                                      {"prefetch": 0}, {"threads": -1}, {"on_damage": "ignore"}, {"seed": -1}])
def test_settings_of_ranks_out_of_range_are_refused(root: Path, settings: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        ShardReader(root, **settings)


def sidecar(root: Path, shard: int) -> Path:
    fragment = read_fragment(LocalRoot(root), shard)
    assert fragment is not None
    assert fragment.info.hidden is not None
    return root / fragment.info.hidden.name


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["main flipped", "sidecar flipped", "main short", "sidecar missing"])
@pytest.mark.parametrize("check_hashes", [True, False])
def test_all_ranks_skip_the_same_damaged_shards_and_stay_in_step(tmp_path: Path, kind: str, check_hashes: bool) -> None:
    make_dataset(tmp_path, PROMPTS)
    path = tmp_path / shard_name(1) if kind.startswith("main") else sidecar(tmp_path, 1)
    if kind.endswith("flipped"):
        flip(path, 100)
    elif kind.endswith("short"):
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    readers = [ShardReader(tmp_path, layers=(1,), batch_tokens=30, dp_rank=rank, dp_world=3, on_damage="skip",
                           check_hashes=check_hashes) for rank in range(3)]
    ranks = [steps_of(reader) for reader in readers]
    assert sorted(flat(ranks)) == [o for o in range(PROMPTS) if o // 4 != 1]
    assert {reader.skipped for reader in readers} == {(1,)}
    assert len({len(rank) for rank in ranks}) == 1
    with pytest.raises(DamageError, match="shard-0000001"):
        steps_of(ShardReader(tmp_path, layers=(1,)))


def test_what_was_skipped_is_part_of_the_state(tmp_path: Path) -> None:
    make_dataset(tmp_path, PROMPTS)
    path = tmp_path / shard_name(3)
    kept = path.read_bytes()
    flip(path, 100)
    reader = ShardReader(tmp_path, batch_tokens=1, on_damage="skip")
    seen = steps_of(reader, 18)
    assert reader.skipped == (3,)
    path.write_bytes(kept)
    resumed = ShardReader(tmp_path, batch_tokens=1)
    resumed.load_state_dict(reader.state_dict())
    assert sorted(flat([seen, steps_of(resumed)])) == [o for o in range(PROMPTS) if o // 4 != 3]


def test_the_hash_is_checked_once_per_process_and_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                  ) -> None:
    from distill_pipe.consume import opened
    make_dataset(tmp_path, 8)
    hashed, real = [], opened.sha256_of
    monkeypatch.setattr(opened, "sha256_of", lambda path: hashed.append(path.name) or real(path))
    list(ShardReader(tmp_path, layers=(1,), check_hashes=False))
    assert hashed == []
    reader = ShardReader(tmp_path, layers=(1,))
    list(reader)
    list(reader.at_epoch(1))
    assert len(hashed) == len(set(hashed)) == 4


def test_a_failure_in_a_thread_is_the_callers_and_no_thread_is_left(tmp_path: Path) -> None:
    make_dataset(tmp_path, PROMPTS)
    before = set(threading.enumerate())
    for _ in ShardReader(tmp_path, batch_tokens=1, threads=3):
        break
    flip(sidecar(tmp_path, 1), 100)
    with pytest.raises(DamageError, match="shard-0000001"):
        list(ShardReader(tmp_path, layers=(1,), threads=3))
    assert set(threading.enumerate()) <= before


def test_ranks_that_are_more_than_shards_train_like_one_process_and_none_hangs(tmp_path: Path) -> None:
    make_dataset(tmp_path / "dataset", 14, Shape(prompts_per_shard=14))
    ranks = 2
    found = run_ranks(reading_rank.__file__, tmp_path, ranks, tmp_path / "dataset")
    alone = reading_rank.train_alone(tmp_path / "dataset", ranks)
    for arrays in found:
        np.testing.assert_allclose(arrays["losses"], alone["losses"], rtol=1e-4)
        np.testing.assert_allclose(arrays["weight"], alone["weight"], rtol=1e-4, atol=1e-6)
    assert sorted(o for arrays in found for o in arrays["seen"].tolist()) == sorted([*range(14), *range(14)])
