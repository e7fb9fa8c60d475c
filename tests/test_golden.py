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
from distill_pipe.produce.head import row_uniforms
from distill_pipe.store.codec import HiddenBlob
from distill_pipe.store.commit import adopt_shard
from distill_pipe.store.finalize import finalize
from distill_pipe.store.hidden_codec import decode_hidden
from distill_pipe.store.manifest import fragment_name, require_run
from distill_pipe.store.norm import read_final_norm
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import read_quarantine
from distill_pipe.store.spec import HiddenCodec
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
    assert (report.shards, report.traces, report.quarantined) == (3, 3, 2)


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
def test_the_golden_blob_of_every_codec_decodes_to_the_same_states(codec: HiddenCodec) -> None:
    golden = CODECS[codec]
    scale_N = None if golden["scales"] is None else np.array(golden["scales"], np.float32)
    decoded_NH = decode_hidden(HiddenBlob(bytes.fromhex(golden["blob"]), scale_N), codec, 12, dtype=torch.float32)
    assert torch.allclose(decoded_NH, torch.tensor(golden["states"]), atol=1e-6)


def test_a_trainer_reads_the_golden_dataset(root: LocalRoot) -> None:
    (batch,) = ShardReader(root.path, layers=(0, 4))
    assert sorted(batch.ordinals_B.tolist()) == [t["ordinal"] for t in EXPECTED]
    mass_R = batch.target.topk_logprobs_RK.exp().sum(1) + batch.target.tail_mass_R
    assert torch.allclose(mass_R, torch.ones(len(mass_R)), atol=1e-6)


def test_the_golden_dataset_holds_the_cases_that_readers_get_wrong() -> None:
    assert len({count for t in EXPECTED for count in t["topk_counts_R"]}) > 3, "heads of several sizes"
    assert any(count == 0 for t in EXPECTED for count in t["tail_counts_R"]), "a row without tail samples"
    assert {t["domain"] for t in EXPECTED} == {"general", None}
    assert {t["finish_reason"] for t in EXPECTED} == {"stop", "length"}
    assert not EXPECTED[0]["prompt_id"].isascii()


def test_the_golden_tail_samples_are_those_of_the_documented_numbers(root: LocalRoot) -> None:
    # Two samples, systematic: the first lies where the uniform number falls in the first half of the tail.
    random_logits = np.random.default_rng(1)
    num_tokens = int(random_logits.integers(6, 14))
    logits_TV = random_logits.normal(0, 2.5, (num_tokens, 64)).astype(np.float32)
    (trace,) = [t for t in stored_traces(root.path) if t.ordinal == 1]
    starts_R = np.cumsum(trace.topk_counts_R) - trace.topk_counts_R
    for r, t in enumerate(trace.positions_R):
        mass_V = np.exp(logits_TV[t].astype(np.float64))
        mass_V[trace.topk_ids_N[starts_R[r]:starts_R[r] + trace.topk_counts_R[r]]] = 0
        share_V = np.cumsum(mass_V) / mass_V.sum()
        u = row_uniforms(7, 1, np.array([t]))[0]
        assert trace.tail_ids_N[2 * r:2 * r + 2].tolist() == np.searchsorted(share_V, [u / 2, (u + 1) / 2]).tolist()


def test_the_golden_norm_is_read(root: LocalRoot) -> None:
    assert read_final_norm(root, 12)[[0, -1]].tolist() == [0.5, 1.5]


def test_the_golden_quarantine_is_read(root: LocalRoot) -> None:
    info = adopt_shard(root, require_run(root), 1).info
    assert info.quarantine is not None
    (prompt,) = read_quarantine(root.local(info.quarantine.name), info.quarantined)
    assert (prompt.ordinal, prompt.code) == (3, "too_long")


def test_the_golden_summary_can_be_made_again_without_fragments(root: LocalRoot) -> None:
    names = ("statistics.json", "_SUCCESS")
    before = {name: root.read(name) for name in names}
    for shard in range(3):
        root.local(fragment_name(shard)).unlink()
        root.local(fragment_name(shard).replace(".json", ".tokens.parquet")).unlink()
    assert finalize(root).recounted == 3
    assert {name: root.read(name) for name in names} == before
