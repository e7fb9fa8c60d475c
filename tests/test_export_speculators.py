"""speculators' own dataset, collation and FP8 transfer read an export, and agree with what the dataset holds."""

import warnings
from pathlib import Path

import pytest
import torch
from export_datasets import PROMPTS, SHAPE, aux, normed_dataset, states
from tiny_datasets import random_trace

from distill_pipe.consume import ShardReader
from distill_pipe.consume.adapters import TrainerSamples, trainer_layout
from distill_pipe.consume.export import export
from distill_pipe.consume.exporters import ExportOptions

pytest.importorskip("speculators", reason="speculators is not installed")
with warnings.catch_warnings():
    # torch's own deprecations, met while speculators is imported.
    warnings.simplefilter("ignore", DeprecationWarning)
    from hs_connectors import FP8Transfer
    from speculators.train.data import ArrowDataset, CollateFn

AUX, LAST = (1, 2, 3), 4
MAX_LEN = 64


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    normed_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def exported(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "out"
    export(root, "speculators", folder)
    return folder


def test_arrow_dataset_reads_every_sample_with_states_before_the_norm(exported) -> None:
    dataset = ArrowDataset(MAX_LEN, exported, on_missing="raise")
    assert len(dataset) == PROMPTS
    for number in range(len(dataset)):
        item = dataset[number]
        trace = random_trace(number, SHAPE)
        assert item["input_ids"].tolist() == trace.token_ids_T[:-1].tolist()
        assert item["loss_mask"].tolist() == trace.loss_mask_T[:-1].astype(int).tolist()
        assert torch.equal(item["hidden_states"], aux(trace, AUX))
        assert torch.equal(item["verifier_last_hidden_states"], states(trace, LAST))
    assert dataset.approx_lengths == [random_trace(i, SHAPE).num_tokens - 1 for i in range(PROMPTS)]


def test_collate_packs_exported_and_adapted_samples_alike(root, exported) -> None:
    layout = trainer_layout(root, "speculators")
    [batch] = ShardReader(root, layers=layout.layers)
    stored = ArrowDataset(MAX_LEN, exported, on_missing="raise")
    collate = CollateFn(MAX_LEN, SHAPE.hidden_size, len(AUX))
    from_files = collate([stored[int(o)] for o in batch.ordinals_B[:4]])
    adapted = collate(list(TrainerSamples([batch], layout))[:4])
    assert from_files.keys() == adapted.keys()
    for name, tensor in from_files.items():
        if isinstance(tensor, torch.Tensor):
            assert tensor.dtype == adapted[name].dtype
            assert torch.equal(tensor, adapted[name]), name
    assert from_files["hidden_states"].shape == (1, MAX_LEN, len(AUX) * SHAPE.hidden_size)
    assert from_files["error_records"] == 0


def test_fp8_transfer_reads_fp8_exports_within_their_rounding(root, tmp_path) -> None:
    options = ExportOptions(dtype="fp8")
    export(root, "speculators", tmp_path / "out", options)
    dataset = ArrowDataset(MAX_LEN, tmp_path / "out", FP8Transfer(tmp_path / "out" / "hidden_states"),
                           on_missing="raise")
    layout = trainer_layout(root, "speculators", options)
    [batch] = ShardReader(root, layers=layout.layers)
    adapted = dict(zip(batch.ordinals_B.tolist(), TrainerSamples([batch], layout), strict=True))
    for number in range(len(dataset)):
        item = dataset[number]
        trace = random_trace(number, SHAPE)
        expected = torch.cat([aux(trace, AUX), states(trace, LAST)], 1).float()
        found = torch.cat([item["hidden_states"], item["verifier_last_hidden_states"]], 1).float()
        # Half a step of E4M3's three bits, of its smallest normal number, and of bfloat16 on the way back.
        largest = expected.abs().amax(1, keepdim=True)
        assert ((found - expected).abs() <= expected.abs() * (2**-4 + 2**-7) + largest * 2**-15).all()
        assert torch.equal(adapted[number]["hidden_states"], item["hidden_states"])


def test_a_sample_whose_tokens_are_not_the_datasets_is_noticed_by_the_trainer(exported) -> None:
    dataset = ArrowDataset(MAX_LEN, exported, on_missing="raise")
    assert dataset.transfer.get_cached(3)["token_ids"].tolist() == dataset.data[3]["input_ids"].tolist()
