"""Catches random access that gives another trace than was asked for, and forms of a batch that do not line up."""

import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_datasets import Shape, make_dataset, random_trace
from torch.utils.data import DataLoader

from distill_pipe.consume import Batch, ShardDataset, ShardReader, join
from distill_pipe.errors import DamageError, UsageError
from distill_pipe.store.manifest import shard_name

PROMPTS = 10


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_dataset(tmp_path, PROMPTS)
    return tmp_path


def same(a: Batch, b: Batch) -> None:
    for name in ("token_ids_T", "position_ids_T", "cu_seqlens_B1", "loss_mask_T", "rows_R", "next_ids_R",
                 "next_logprob_R", "ordinals_B"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert all(torch.equal(a.hidden[n], b.hidden[n]) for n in a.hidden | b.hidden)
    for name in ("topk_ids_RK", "topk_logprobs_RK", "tail_mass_R", "tail_ids_RM", "tail_logprobs_RM"):
        assert torch.equal(getattr(a.target, name), getattr(b.target, name)), name


def test_any_trace_by_its_number(root: Path) -> None:
    dataset = ShardDataset(root, layers=(1, 4), open_shards=1)
    assert len(dataset) == PROMPTS
    for index in (9, 0, 4, 3, -1):
        batch = dataset[index]
        trace = random_trace(index % PROMPTS)
        assert batch.ordinals_B.tolist() == [trace.ordinal]
        assert batch.token_ids_T.tolist() == trace.token_ids_T.tolist()
        assert torch.equal(batch.hidden[4][:-1], torch.from_numpy(trace.hidden[4]).bfloat16())
    with pytest.raises(IndexError):
        dataset[PROMPTS]


def test_a_split_numbers_its_own_traces(root: Path) -> None:
    heldout = ShardDataset(root, split="heldout", holdout_every=4)
    assert [int(batch.ordinals_B) for batch in (heldout[0], heldout[1])] == [3, 7]
    assert len(ShardDataset(root, split="train", holdout_every=4)) == PROMPTS - 2


def test_traces_joined_are_the_batch_that_a_reader_packs(root: Path) -> None:
    (packed,) = ShardReader(root, layers=(2,))
    dataset = ShardDataset(root, layers=(2,))
    same(join([dataset[int(o)] for o in packed.ordinals_B]), packed)


def test_a_data_loader_shuffles_and_joins_in_workers(root: Path) -> None:
    dataset = ShardDataset(root, layers=(1,))
    assert len(dataset[0].ordinals_B)
    # As a spawned worker gets it; what is open stays behind.
    sent = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - made one line above
    loader = DataLoader(sent, batch_size=4, shuffle=True, collate_fn=join, num_workers=2)
    assert sorted(int(o) for batch in loader for o in batch.ordinals_B) == list(range(PROMPTS))


def test_the_padded_form_has_a_trace_to_a_row(root: Path) -> None:
    (batch,) = ShardReader(root, layers=(1,))
    padded = batch.padded(token_id=63)
    edges = batch.cu_seqlens_B1.tolist()
    for row, (start, stop) in enumerate(pairwise(edges)):
        length = stop - start
        assert torch.equal(padded.token_ids_BT[row, :length], batch.token_ids_T[start:stop])
        assert (padded.token_ids_BT[row, length:] == 63).all()
        assert torch.equal(padded.hidden[1][row, :length], batch.hidden[1][start:stop])
        assert (padded.hidden[1][row, length:] == 0).all()
        assert padded.attention_mask_BT[row, :length].all()
        assert not padded.attention_mask_BT[row, length:].any()
        assert torch.equal(padded.loss_mask_BT[row, :length], batch.loss_mask_T[start:stop])
    assert torch.equal(padded.token_ids_BT.flatten()[padded.rows_R], batch.token_ids_T[batch.rows_R])
    assert torch.equal(padded.hidden[1].flatten(0, 1)[padded.rows_R], batch.hidden[1][batch.rows_R])


def test_a_batch_moves_as_a_whole(root: Path) -> None:
    (batch,) = ShardReader(root, layers=(1,))
    moved = batch.to("meta", non_blocking=True)
    assert {t.device.type for t in (moved.token_ids_T, moved.hidden[1], moved.target.topk_ids_RK)} == {"meta"}
    assert moved.state_dict() == batch.state_dict() != {}


def test_missing_data_is_named_when_it_is_asked_for(root: Path) -> None:
    dataset = ShardDataset(root)
    (root / shard_name(1)).unlink()
    assert len(dataset[0].token_ids_T)
    with pytest.raises(DamageError, match=r"shard-0000001.*missing"):
        dataset[4]


def test_a_shard_that_could_not_be_opened_once_is_tried_again(root: Path) -> None:
    dataset, path = ShardDataset(root), root / shard_name(1)
    kept = path.read_bytes()
    path.unlink()
    for _ in range(2):
        with pytest.raises(DamageError, match="missing"):
            dataset[4]
    path.write_bytes(kept)
    assert dataset[4].ordinals_B.tolist() == [4]


def test_settings_out_of_range_are_refused(root: Path) -> None:
    with pytest.raises(UsageError):
        ShardDataset(root, open_shards=0)
    with pytest.raises(UsageError, match="does not store layers"):
        ShardDataset(root, layers=(3,))


def test_an_empty_split_has_no_traces(tmp_path: Path) -> None:
    make_dataset(tmp_path, 2, Shape(prompts_per_shard=1))
    assert len(ShardDataset(tmp_path, split="heldout")) == 0
    assert list(ShardReader(tmp_path, split="heldout")) == []
