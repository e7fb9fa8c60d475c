"""Catches a reader that loses, repeats, misplaces or silently replaces what a dataset holds."""

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_datasets import Shape, commit_traces, make_dataset, random_trace, start_run

from distill_pipe.consume import Batch, ShardReader, tv_loss
from distill_pipe.consume.sparse import FlatEntries, SparseTarget
from distill_pipe.errors import DamageError, MismatchError, UsageError
from distill_pipe.store.manifest import encode_record, fragment_name, read_fragment, shard_name
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.spec import HiddenCodec

PROMPTS = 10


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_dataset(tmp_path / "dataset", PROMPTS)
    return tmp_path / "dataset"


def ordinals(reader: ShardReader) -> list[int]:
    return [int(o) for batch in reader for o in batch.ordinals_B]


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def sidecar(root: Path, shard: int) -> Path:
    fragment = read_fragment(LocalRoot(root), shard)
    assert fragment is not None
    assert fragment.info.hidden is not None
    return root / fragment.info.hidden.name


def spans(batch: Batch) -> dict[int, slice]:
    edges = batch.cu_seqlens_B1.tolist()
    return {int(o): slice(*edges[i:i + 2]) for i, o in enumerate(batch.ordinals_B)}


def test_tokens_masks_and_hidden_states_come_back_as_they_were_written(root: Path) -> None:
    for batch in ShardReader(root, layers=(1, 4), batch_tokens=40):
        assert batch.cu_seqlens_B1.dtype == torch.int32
        assert batch.cu_seqlens_B1[-1] == len(batch.token_ids_T) == len(batch.loss_mask_T)
        for ordinal, span in spans(batch).items():
            trace = random_trace(ordinal)
            assert batch.token_ids_T[span].tolist() == trace.token_ids_T.tolist()
            assert batch.loss_mask_T[span].tolist() == trace.loss_mask_T.tolist()
            assert batch.position_ids_T[span].tolist() == list(range(trace.num_tokens))
            for layer in (1, 4):
                hidden_TH = batch.hidden[layer][span]
                assert hidden_TH.dtype == torch.bfloat16
                assert torch.equal(hidden_TH[:-1], torch.from_numpy(trace.hidden[layer]).bfloat16())
                assert (hidden_TH[-1] == 0).all()


def test_each_row_belongs_to_the_position_it_is_said_to_supervise(root: Path) -> None:
    for batch in ShardReader(root, batch_tokens=60):
        assert batch.loss_mask_T[batch.rows_R + 1].all()
        assert torch.equal(batch.next_ids_R, batch.token_ids_T[batch.rows_R + 1])
        assert len(batch.rows_R) == len(batch.target) == len(batch.next_logprob_R)
        start = 0
        for ordinal, span in spans(batch).items():
            trace = random_trace(ordinal)
            rows = slice(start, start := start + trace.num_rows)
            assert (batch.rows_R[rows] - span.start).tolist() == trace.positions_R.tolist()
            target = batch.target[rows]
            assert target.topk_ids_RK.flatten().tolist() == trace.topk_ids_N.tolist()
            # The reader scales the head to 1 - tail mass, from which float32 logits differ by rounding alone.
            np.testing.assert_allclose(target.topk_logprobs_RK.flatten(), trace.topk_logprobs_N, atol=2e-6)
            assert target.tail_ids_RM.flatten().tolist() == trace.tail_ids_N.tolist()
            assert target.tail_logprobs_RM.flatten().tolist() == trace.tail_logprobs_N.tolist()
            assert target.tail_mass_R.tolist() == trace.tail_mass_R.tolist()
            assert batch.next_logprob_R[rows].tolist() == trace.next_logprob_R.tolist()
        assert start == len(batch.rows_R)


def test_float32_datasets_give_float32_states(tmp_path: Path) -> None:
    make_dataset(tmp_path, 3, Shape(hidden_codec="f32"))
    (batch,) = ShardReader(tmp_path, layers=(2,))
    for ordinal, span in spans(batch).items():
        assert np.array_equal(batch.hidden[2][span][:-1].numpy(), random_trace(ordinal).hidden[2])


def test_rows_with_different_numbers_of_entries_are_padded(tmp_path: Path) -> None:
    flat = [FlatEntries(np.array(c, np.int32), np.array(i, np.int32), np.array(p, np.float32))
            for c, i, p in (([2, 1], [3, 1, 2], [-0.7, -1.2, -0.1]), ([0, 2], [0, 0], [-3, -3]))]
    target = SparseTarget.from_flat(*flat, np.array([0.2, 0.1], np.float32), 4)
    assert target.topk_ids_RK.tolist() == [[3, 1], [2, -1]]
    assert target.tail_ids_RM.tolist() == [[-1, -1], [0, 0]]
    assert tv_loss(torch.zeros(2, 4), target).loss.isfinite()
    with pytest.raises(UsageError, match="vocabulary of 3"):
        SparseTarget.from_flat(*flat, np.array([0.2, 0.1], np.float32), 3)


@pytest.mark.parametrize("batch_tokens", [1, 25, 8192])
def test_every_trace_comes_exactly_once_per_epoch_whatever_the_budget(root: Path, batch_tokens: int) -> None:
    for epoch in range(3):
        reader = ShardReader(root, batch_tokens=batch_tokens, epoch=epoch)
        assert sorted(ordinals(reader)) == list(range(PROMPTS))
        for batch in reader:
            assert len(batch.token_ids_T) <= batch_tokens or len(batch.ordinals_B) == 1


@pytest.mark.parametrize("prompts_per_shard", [1, 5, PROMPTS])
def test_the_order_is_a_function_of_seed_and_epoch_alone(tmp_path: Path, prompts_per_shard: int) -> None:
    root = tmp_path
    make_dataset(root, PROMPTS, Shape(prompts_per_shard=prompts_per_shard))
    orders = {(seed, epoch): ordinals(ShardReader(root, seed=seed, epoch=epoch))
              for seed in range(2) for epoch in range(2)}
    assert len({tuple(o) for o in orders.values()}) == 4
    assert orders[1, 1] == ordinals(ShardReader(root, seed=1, epoch=1, layers=(1,), batch_tokens=30))
    assert orders[1, 1] == ordinals(ShardReader(root, seed=1).at_epoch(1))


def test_heldout_and_train_split_the_traces_by_ordinal(root: Path) -> None:
    heldout = ordinals(ShardReader(root, split="heldout", holdout_every=4))
    train = ordinals(ShardReader(root, split="train", holdout_every=4, epoch=7))
    assert sorted(heldout) == [3, 7]
    assert sorted(train + heldout) == list(range(PROMPTS))


def test_shards_committed_later_are_not_seen(tmp_path: Path) -> None:
    run = start_run(tmp_path, PROMPTS)
    commit_traces(tmp_path, run, [random_trace(i) for i in range(PROMPTS)])
    last = tmp_path / shard_name(2)
    kept = last.read_bytes()
    last.unlink()
    reader = ShardReader(tmp_path)
    last.write_bytes(kept)
    assert sorted(ordinals(reader)) == sorted(ordinals(reader.at_epoch(1))) == list(range(8))


def test_only_the_requested_layers_are_decoded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill_pipe.consume import opened as module
    asked = []
    real = module.read_sidecar
    monkeypatch.setattr(module, "read_sidecar", lambda *args: asked.append(args[2]) or real(*args))
    assert [set(batch.hidden) for batch in ShardReader(root, layers=(2,))] == [{2}]
    assert asked == [(2,)] * 3
    asked.clear()
    assert [batch.hidden for batch in ShardReader(root)] == [{}]
    assert asked == []


def test_a_layer_that_is_not_stored_is_refused_with_those_that_are(root: Path) -> None:
    with pytest.raises(UsageError, match=r"layers \[3\]; it stores \[1, 2, 4\]"):
        ShardReader(root, layers=(1, 3))


@pytest.mark.parametrize("settings", [{"batch_tokens": 0}, {"holdout_every": 1}, {"split": "test"}])
def test_settings_out_of_range_are_refused(root: Path, settings: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        ShardReader(root, **settings)


def test_a_folder_without_a_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"no run\.json"):
        ShardReader(tmp_path)


@pytest.mark.parametrize("with_fragment", [True, False])
def test_a_flipped_byte_in_a_shard_ends_the_epoch_with_its_name(root: Path, with_fragment: bool) -> None:
    if not with_fragment:
        (root / fragment_name(1)).unlink()
    damage(root / shard_name(1), 200)
    with pytest.raises(DamageError, match="shard-0000001"):
        ordinals(ShardReader(root))


def test_a_short_or_missing_shard_ends_the_epoch_with_its_name(root: Path) -> None:
    reader = ShardReader(root)
    path = root / shard_name(2)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamageError, match=r"shard-0000002.*bytes, expected"):
        ordinals(reader)
    path.unlink()
    with pytest.raises(DamageError, match=r"shard-0000002.*is missing"):
        ordinals(reader)


def test_a_damaged_sidecar_ends_the_epoch_with_its_name(root: Path) -> None:
    path = sidecar(root, 0)
    damage(path, 100)
    with pytest.raises(DamageError, match=path.name):
        ordinals(ShardReader(root, layers=(1,)))
    assert len(ordinals(ShardReader(root))) == PROMPTS


def test_a_sidecar_of_another_run_is_refused_even_where_its_ordinals_fit(root: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "other", PROMPTS, Shape(top_k=9))
    foreign = sidecar(tmp_path / "other", 0)
    shutil.copy(foreign, sidecar(root, 0).parent)
    fragments = [read_fragment(LocalRoot(folder), 0) for folder in (root, tmp_path / "other")]
    own, other = (f for f in fragments if f is not None)
    mixed = msgspec.structs.replace(own, info=msgspec.structs.replace(own.info, hidden=other.info.hidden))
    (root / fragment_name(0)).write_bytes(encode_record(mixed))
    with pytest.raises(DamageError, match=f"{foreign.name} does not hold what this run captures"):
        ordinals(ShardReader(root, layers=(1,)))


def test_a_reader_works_without_fragments_and_writes_nothing(root: Path) -> None:
    for path in (root / "_manifest").rglob("*.json"):
        path.unlink()
    before = sorted(root.rglob("*"))
    assert len(ordinals(ShardReader(root, layers=(1,)))) == PROMPTS
    assert sorted(root.rglob("*")) == before


def test_importing_consume_needs_neither_engine_nor_safetensors() -> None:
    import subprocess
    import sys
    blocked = ("vllm", "ray", "safetensors", "transformers", "distill_pipe.produce")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import distill_pipe.consume"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_counting_traces_decodes_one_small_column(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill_pipe.consume import opened as module
    monkeypatch.setattr(module, "read_main", None)
    assert ShardReader(root).num_traces() == PROMPTS


def test_lengths_come_from_the_record_or_else_from_the_shard(root: Path) -> None:
    recorded = ordinals(ShardReader(root, batch_tokens=30))
    fragment = read_fragment(LocalRoot(root), 0)
    assert fragment is not None
    assert fragment.info.lengths == tuple(random_trace(i).num_tokens for i in range(4))
    without = msgspec.structs.replace(fragment, info=msgspec.structs.replace(fragment.info, lengths=None))
    (root / fragment_name(0)).write_bytes(encode_record(without))
    (root / fragment_name(1)).unlink()
    assert ordinals(ShardReader(root, batch_tokens=30)) == recorded


def test_lengths_that_the_shard_does_not_have_are_damage(root: Path) -> None:
    fragment = read_fragment(LocalRoot(root), 1)
    assert fragment is not None
    false = msgspec.structs.replace(fragment, info=msgspec.structs.replace(fragment.info, lengths=(9, 9, 9, 9)))
    (root / fragment_name(1)).write_bytes(encode_record(false))
    with pytest.raises(DamageError, match=r"shard-0000001.*other lengths than its record"):
        ordinals(ShardReader(root))


def test_without_the_target_hidden_states_are_read_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill_pipe.consume import opened as module
    whole = list(ShardReader(root, layers=(2,), batch_tokens=40))
    monkeypatch.setattr(module, "read_main", None)
    alone = list(ShardReader(root, layers=(2,), batch_tokens=40, target=False))
    for batch, other in zip(alone, whole, strict=True):
        assert torch.equal(batch.token_ids_T, other.token_ids_T)
        assert torch.equal(batch.loss_mask_T, other.loss_mask_T)
        assert torch.equal(batch.hidden[2], other.hidden[2])
        assert len(batch.rows_R) == len(batch.next_ids_R) == len(batch.target) == 0
        assert batch.padded().rows_R.tolist() == []
    path = root / shard_name(1)
    group = pq.read_metadata(path).row_group(0)
    (tokens,) = (group.column(i) for i in range(group.num_columns) if "token_ids" in group.column(i).path_in_schema)
    damage(path, tokens.data_page_offset + tokens.total_compressed_size - 5)
    with pytest.raises(DamageError, match="shard-0000001"):
        ordinals(ShardReader(root, target=False, check_hashes=False))


@pytest.mark.parametrize("codec", ["q6", "q8", "bf16-split", "bf16", "fp8", "f32"])
def test_hidden_states_are_decoded_on_the_device_that_was_asked_for(tmp_path: Path, codec: HiddenCodec) -> None:
    make_dataset(tmp_path, 4, Shape(hidden_codec=codec))
    on_cpu, elsewhere = (next(iter(ShardReader(tmp_path, layers=(1,), device=device))) for device in ("cpu", "meta"))
    assert elsewhere.hidden[1].device.type == "meta"
    assert (elsewhere.hidden[1].shape, elsewhere.hidden[1].dtype) == (on_cpu.hidden[1].shape, on_cpu.hidden[1].dtype)
    assert torch.equal(elsewhere.token_ids_T, on_cpu.token_ids_T)


def test_a_layer_asked_for_twice_is_read_once(root: Path) -> None:
    assert [set(batch.hidden) for batch in ShardReader(root, layers=(2, 2))] == [{2}]
