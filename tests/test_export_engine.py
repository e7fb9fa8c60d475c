"""Exports of what a real engine captured: the exported last state times the head is the stored distribution."""

import json
from pathlib import Path

import pytest
import torch
from runs import stored_traces
from safetensors.torch import load_file
from torch import Tensor

from distill_pipe.consume.drafts.target_files import read_weights
from distill_pipe.consume.export import export
from distill_pipe.consume.exporters import ExportOptions
from distill_pipe.produce.smollm2 import materialise_smollm2
from distill_pipe.store.trace import Trace

pytestmark = pytest.mark.engine
OPTIONS = ExportOptions(layers=(2, 15), dtype="f32")


@pytest.fixture(scope="module")
def head_VH() -> Tensor:  # noqa: N802 - a shape
    return read_weights(materialise_smollm2(), ("model.embed_tokens.weight",))["model.embed_tokens.weight"].float()


def assert_distributions(trace: Trace, last_SH: Tensor, head_VH: Tensor) -> None:
    """Every row is the softmax of the state at its own position: neither norm nor position is off."""
    assert len(last_SH) == trace.num_tokens - 1
    logprobs_RV = (last_SH[torch.from_numpy(trace.positions_R)] @ head_VH.T).log_softmax(1)
    ids_RK = torch.tensor(trace.topk_ids_N).long().view(trace.num_rows, -1)
    stored_RK = torch.tensor(trace.topk_logprobs_N).view(trace.num_rows, -1)
    torch.testing.assert_close(logprobs_RV.gather(1, ids_RK), stored_RK, rtol=0, atol=2e-3)


def test_states_behind_the_norm_give_the_stored_rows(scored, head_VH, tmp_path) -> None:
    report = export(scored, "modelopt", tmp_path, OPTIONS)
    assert (report.layers, report.layer_ids) == ((2, 15, 30), (1, 14))
    for number, trace in enumerate(stored_traces(scored)):
        [path] = tmp_path.rglob(f"data_{number}.pt")
        sample = torch.load(path, weights_only=True)
        assert sample["input_ids"].tolist() == trace.token_ids_T[:-1].tolist()
        assert_distributions(trace, sample["hidden_states"], head_VH)
        for place, layer in enumerate((2, 15)):
            part_SH = sample["aux_hidden_states"].unflatten(1, (2, -1))[:, place]
            assert torch.equal(part_SH, torch.from_numpy(trace.hidden[layer]))


def test_states_before_the_norm_give_them_through_the_targets_own_norm(scored, head_VH, tmp_path) -> None:
    export(scored, "speculators", tmp_path, OPTIONS)
    folder = materialise_smollm2()
    weight_H = read_weights(folder, ("model.norm.weight",))["model.norm.weight"].float()
    eps = json.loads((Path(folder) / "config.json").read_bytes())["rms_norm_eps"]
    for number, trace in enumerate(stored_traces(scored)):
        last_SH = load_file(tmp_path / "hidden_states" / f"hs_{number}.safetensors")["hidden_states"][:, -1]
        normed_SH = torch.nn.functional.rms_norm(last_SH, (last_SH.shape[1],), weight_H, eps)
        assert_distributions(trace, normed_SH, head_VH)


def test_embeddings_are_layer_minus_one_where_a_trainer_takes_them(scored, tmp_path) -> None:
    report = export(scored, "deepspec", tmp_path)
    assert report.layer_ids == (-1, 1, 14)
