"""Catches a version that cannot read what version 1 wrote, or reads other numbers in it. The data is never remade."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import stored_traces

from distill_pipe.consume.reader import ShardReader
from distill_pipe.store.codec import HiddenBlob
from distill_pipe.store.commit import adopt_shard
from distill_pipe.store.finalize import finalize
from distill_pipe.store.hidden_codec import decode_hidden
from distill_pipe.store.manifest import fragment_name, require_run
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import read_quarantine
from distill_pipe.store.verify import verify

GOLDEN = Path(__file__).parent / "golden" / "v1"
EXPECTED: list[dict[str, Any]] = json.loads((GOLDEN / "expected.json").read_text())
CODECS: dict[str, Any] = json.loads((GOLDEN / "codecs.json").read_text())


@pytest.fixture
def root(tmp_path: Path) -> LocalRoot:
    shutil.copytree(GOLDEN / "dataset", tmp_path / "dataset")
    return LocalRoot(tmp_path / "dataset")


def test_the_golden_dataset_is_clean(root: LocalRoot) -> None:
    report = verify(root)
    assert report.clean
    assert (report.shards, report.traces, report.quarantined) == (2, 3, 1)


def test_every_number_of_the_golden_dataset_is_read_as_it_was(root: LocalRoot) -> None:
    found = list(stored_traces(root.path))
    assert len(found) == len(EXPECTED)
    for trace, wanted in zip(found, EXPECTED, strict=True):
        for name, value in wanted.items():
            if name == "hidden":
                continue
            stored = getattr(trace, name)
            assert (stored.tolist() if isinstance(stored, np.ndarray) else stored) == value, name
        for layer, states_TH in wanted["hidden"].items():
            np.testing.assert_allclose(trace.hidden[int(layer)], states_TH, atol=1e-5)


@pytest.mark.parametrize("codec", CODECS)
def test_the_golden_blob_of_every_codec_decodes_to_the_same_states(codec: str) -> None:
    golden = CODECS[codec]
    scale_N = None if golden["scales"] is None else np.array(golden["scales"], np.float32)
    decoded_NH = decode_hidden(HiddenBlob(bytes.fromhex(golden["blob"]), scale_N), codec, 12,  # type: ignore[arg-type]
                               dtype=torch.float32)
    assert torch.allclose(decoded_NH, torch.tensor(golden["states"]), atol=1e-6)


def test_a_trainer_reads_the_golden_dataset(root: LocalRoot) -> None:
    (batch,) = ShardReader(root.path, layers=(1, 4))
    assert sorted(batch.ordinals_B.tolist()) == [t["ordinal"] for t in EXPECTED]
    mass_R = batch.target.topk_logprobs_RK.exp().sum(1) + batch.target.tail_mass_R
    assert torch.allclose(mass_R, torch.ones(len(mass_R)), atol=1e-6)


def test_the_golden_quarantine_is_read(root: LocalRoot) -> None:
    info = adopt_shard(root, require_run(root), 1).info
    assert info.quarantine is not None
    (prompt,) = read_quarantine(root.local(info.quarantine.name), info.quarantined)
    assert (prompt.ordinal, prompt.code) == (3, "too_long")


def test_the_golden_summary_can_be_made_again_without_fragments(root: LocalRoot) -> None:
    names = ("statistics.json", "_SUCCESS")
    before = {name: root.read(name) for name in names}
    for shard in range(2):
        root.local(fragment_name(shard)).unlink()
        root.local(fragment_name(shard).replace(".json", ".tokens.parquet")).unlink()
    assert finalize(root).recounted == 2
    assert {name: root.read(name) for name in names} == before
