"""Catches a draft that is compared with the wrong position, sees what it must not see, or does not learn.

The target of these tests is a bigram table: the distribution of token s+1 is `table[x_s]`, so a draft that pairs
g_t with x_{t+1} can learn row t+1 exactly. Shapes: T tokens, V vocabulary, H hidden size.
"""

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_datasets import Shape, commit_traces, make_dataset, start_run, trace_from_logits
from torch import Tensor, nn

from distill_pipe.consume import Batch, ShardReader
from distill_pipe.consume.drafts.eagle3 import Eagle3Draft, drafted_rows, read_config, read_weights
from distill_pipe.consume.train import LOSSES, TrainSettings, evaluate, learning_rate_share, train
from distill_pipe.errors import UsageError

SHAPE = Shape(vocab_size=32, hidden_size=32, num_layers=4, layers=(1, 2, 4), hidden_codec="f32", top_k=8,
              prompts_per_shard=20)
CONFIG = {"hidden_size": 32, "vocab_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
          "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 1000.0}}


def table() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, (32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bigrams")
    run, random = start_run(path, 60, SHAPE), np.random.default_rng(1)
    traces = []
    for ordinal in range(60):
        tokens_T = random.integers(0, 32, random.integers(10, 30)).astype(np.int32)
        mask_T = np.arange(len(tokens_T)) >= ordinal % 3 + 1
        hidden = {n: random.normal(0, n, (len(tokens_T) - 1, 32)).astype(np.float32) for n in SHAPE.layers}
        traces.append(trace_from_logits(ordinal, tokens_T, mask_T, table()[tokens_T], hidden, SHAPE))
    commit_traces(path, run, traces)
    return path


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"), {})


def write_target(folder: Path, extra: dict[str, Tensor]) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "llama"}))
    weights = {"model.embed_tokens.weight": torch.eye(32), "model.norm.weight": torch.full((32,), 2.0)}
    save_file(weights | extra, folder / "model.safetensors")
    return folder


def one_batch(root: Path) -> Batch:
    return next(iter(ShardReader(root, layers=SHAPE.layers, batch_tokens=100)))


def new_draft(target: Path) -> Eagle3Draft:
    torch.manual_seed(0)
    draft = Eagle3Draft(read_config(target), SHAPE.layers)
    draft.start_from_target(target)
    return draft


class BigramDraft(nn.Module):
    """Knows the table, and looks `ahead` tokens further than index t to choose its row."""

    device = torch.device("cpu")

    def __init__(self, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead

    def forward(self, batch: Batch) -> Tensor:
        return torch.from_numpy(table())[batch.token_ids_T.roll(-self.ahead)]

    def logits(self, states_RV: Tensor) -> Tensor:
        return states_RV


def test_the_draft_output_at_t_is_compared_with_the_target_row_of_position_t_plus_1(root: Path) -> None:
    reader = ShardReader(root, layers=SHAPE.layers, batch_tokens=100)
    alphas = {ahead: evaluate(BigramDraft(ahead), reader) for ahead in range(3)}
    # Tail samples of a draft that equals the target all count in full, so there is no noise.
    assert alphas[1].alpha == pytest.approx(1, abs=1e-4)
    assert alphas[0].alpha < 0.5
    assert alphas[2].alpha < 0.5
    assert alphas[0].lower <= alphas[0].upper <= 1 + 1e-4


def test_a_row_sees_states_before_its_position_and_tokens_up_to_it(root: Path, target: Path) -> None:
    draft, batch = new_draft(target), one_batch(root)
    index_R, row_R = drafted_rows(batch)
    pick = 5
    position = int(batch.rows_R[row_R[pick]])
    before = draft(batch)[index_R[pick]]

    def moves(changed: Batch) -> bool:
        return not torch.allclose(draft(changed)[index_R[pick]], before, atol=1e-6)

    def with_token(at: int) -> Batch:
        tokens_T = batch.token_ids_T.clone()
        tokens_T[at] = (tokens_T[at] + 1) % 32
        return replace(batch, token_ids_T=tokens_T)

    def with_state(at: int) -> Batch:
        hidden = {n: h.clone() for n, h in batch.hidden.items()}
        for hidden_TH in hidden.values():
            hidden_TH[at] = hidden_TH[at].flip(0)
        return replace(batch, hidden=hidden)

    assert moves(with_token(position))
    assert not moves(with_token(position + 1))
    assert moves(with_state(position - 1))
    assert not moves(with_state(position))


def test_rows_without_a_draft_output_are_left_out_and_all_others_kept(root: Path) -> None:
    batch = one_batch(root)
    index_R, row_R = drafted_rows(batch)
    assert torch.equal(batch.rows_R[row_R], index_R + 1)
    assert torch.equal(batch.position_ids_T[index_R] + 1, batch.position_ids_T[index_R + 1])
    assert len(row_R) == int((batch.position_ids_T[batch.rows_R] > 0).sum()) < len(batch.rows_R)


def test_sequences_of_one_batch_do_not_see_each_other(root: Path, target: Path) -> None:
    draft, batch = new_draft(target), one_batch(root)
    start, stop = batch.cu_seqlens_B1[1:3].tolist()
    alone = replace(batch, token_ids_T=batch.token_ids_T[start:stop], position_ids_T=torch.arange(stop - start),
                    cu_seqlens_B1=torch.tensor([0, stop - start]),
                    hidden={n: h[start:stop] for n, h in batch.hidden.items()})
    # The very last output pairs its state with the next sequence's first token, and is compared with nothing.
    assert torch.allclose(draft(batch)[start:stop - 1], draft(alone)[:-1], atol=1e-5)


def test_training_raises_the_heldout_acceptance_rate_and_leaves_a_loadable_draft(root: Path, target: Path,
                                                                                 tmp_path: Path) -> None:
    seen = []
    settings = TrainSettings(epochs=10, lr=1e-2, batch_tokens=128)
    result = train(root, target, settings, out=tmp_path / "draft", on_step=seen.append)
    assert result.layers == (1, 2)
    assert result.after.alpha > result.before.alpha + 0.3
    assert result.after.lower <= result.after.alpha <= result.after.upper
    assert result.loss_last < result.loss_first
    assert (result.steps, seen[-1].progress) == (len(seen), 1)
    draft = Eagle3Draft(read_config(target), result.layers)
    draft.start_from_target(target)
    absent = draft.load_state_dict(load_file(tmp_path / "draft" / "model.safetensors"), strict=False)
    assert absent.unexpected_keys == []
    assert sorted(absent.missing_keys) == ["embed_tokens.weight", "lm_head.weight"]
    heldout = ShardReader(root, layers=result.layers, split="heldout")
    assert evaluate(draft, heldout).alpha == pytest.approx(result.after.alpha, abs=1e-4)
    assert json.loads((tmp_path / "draft" / "draft.json").read_bytes())["layers"] == [1, 2]


@pytest.mark.parametrize(("loss", "tail"), [*((loss, "sampled") for loss in LOSSES), ("lk-hybrid", "drop"),
                                            ("lk-hybrid", "bucket")])
def test_every_loss_and_tail_rule_learns(root: Path, target: Path, loss: str, tail: str) -> None:
    settings = msgspec.convert({"loss": loss, "tail": tail, "epochs": 5, "lr": 1e-2, "batch_tokens": 128},
                               TrainSettings)
    result = train(root, target, settings)
    assert result.loss_last < result.loss_first
    assert result.after.alpha > result.before.alpha + 0.03


def test_the_same_seed_trains_the_same_draft(root: Path, target: Path) -> None:
    first, second, other = (train(root, target, TrainSettings(epochs=1, seed=seed)) for seed in (3, 3, 4))
    assert (first.after, first.loss_last) == (second.after, second.loss_last)
    assert first.after != other.after


def test_a_separate_lm_head_is_taken_over_and_a_tied_one_is_shared(target: Path, tmp_path: Path) -> None:
    tied = new_draft(target)
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert torch.equal(tied.norm.weight, torch.full((32,), 2.0))
    untied = new_draft(write_target(tmp_path, {"lm_head.weight": torch.full((32, 32), 0.5)}))
    assert (untied.lm_head.weight == 0.5).all()
    trained = Eagle3Draft(read_config(target), SHAPE.layers, train_head=True)
    trained.start_from_target(target)
    assert trained.lm_head.weight is not trained.embed_tokens.weight
    assert torch.equal(trained.lm_head.weight, trained.embed_tokens.weight)
    assert [trained.lm_head.weight.requires_grad, trained.embed_tokens.weight.requires_grad] == [True, False]


def test_weights_are_read_from_an_indexed_set_of_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3), "c": torch.ones(1)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {n: len(w) for n, w in read_weights(tmp_path, ("a", "b", "absent")).items()} == {"a": 2, "b": 3}


def test_what_cannot_be_trained_is_refused_with_a_reason(root: Path, target: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "other", 10, Shape(vocab_size=48))
    with pytest.raises(UsageError, match="vocabulary 32; the dataset's target has 8 and 48"):
        train(tmp_path / "other", target)
    make_dataset(tmp_path / "bare", 10, Shape(vocab_size=32, hidden_size=32, layers=()))
    with pytest.raises(UsageError, match="no hidden states"):
        train(tmp_path / "bare", target)
    with pytest.raises(UsageError, match="held out"):
        train(root, target, TrainSettings(holdout_every=1000))
    with pytest.raises(UsageError, match=r"config\.json"):
        train(root, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UsageError, match="safetensors"):
        train(root, tmp_path)


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    assert [learning_rate_share(p, 0.1) for p in (0.05, 0.1, 0.55, 1.0)] == pytest.approx([0.5, 1, 0.5, 0])
    assert learning_rate_share(0.5, 1.0) == 0.5
