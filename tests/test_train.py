"""Catches a trainer that does not learn, that is not the same twice, or that goes on from a checkpoint as another one.

The target of these tests is a bigram table (see tiny_drafts), which a draft can learn exactly.
"""

import json
import multiprocessing
from itertools import islice
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_datasets import Shape, make_dataset
from tiny_drafts import CONFIG, SHAPE, TableDraft, one_batch, table, write_bigrams, write_target
from torch.distributed import ProcessGroup

from distill_pipe.consume import Batch, ShardReader
from distill_pipe.consume.acceptance import heldout_acceptance
from distill_pipe.consume.drafts.checkpoint import DRAFTS, load_draft, new_draft
from distill_pipe.consume.drafts.target_files import read_config
from distill_pipe.consume.objective import Objective, batch_loss, exact_rows
from distill_pipe.consume.ranks import join_group, leave_group
from distill_pipe.consume.train import (
    Step,
    TrainSettings,
    average_gradients,
    frequent_vocabulary,
    learning_rate_share,
    train,
)
from distill_pipe.errors import MismatchError, UsageError

LOSSES = ("kl", "reverse-kl", "tv", "lk-alpha", "lk-hybrid", "expected-length")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bigrams(tmp_path_factory.mktemp("bigrams"))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


def settings(**given: object) -> TrainSettings:
    usual = {"positions": 3, "steps": 30, "lr": 1e-2, "warmup_steps": 5, "batch_tokens": 128}
    return msgspec.convert(usual | given, TrainSettings)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_training_raises_the_heldout_acceptance_rate_of_every_position_and_leaves_a_loadable_draft(
        root: Path, target: Path, tmp_path: Path) -> None:
    seen: list[Step] = []
    result = train(root, target, settings(steps=100), out=tmp_path, on_step=seen.append)
    assert result.layers == (1, 2)
    for before, after in zip(result.before, result.after, strict=True):
        assert after.alpha > before.alpha + 0.2
        assert after.lower - 1e-6 <= after.alpha <= after.upper + 0.05
    assert result.loss_last < result.loss_first
    assert (result.steps, seen[-1].progress, len(seen[-1].alphas)) == (len(seen), 1, 3)
    heldout = ShardReader(root, layers=result.layers, split="heldout")
    found = heldout_acceptance(load_draft(tmp_path, target), heldout, "sampled")
    assert [a.alpha for a in found] == pytest.approx([a.alpha for a in result.after], abs=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "draft.json", "model.safetensors"]


@pytest.mark.parametrize(("arch", "loss"), [*(("eagle3", loss) for loss in LOSSES),
                                            *((arch, "lk-hybrid") for arch in sorted(DRAFTS) if arch != "eagle3")])
def test_every_loss_and_every_kind_of_draft_learns(root: Path, target: Path, arch: str, loss: str) -> None:
    # What only sees where draft and target already overlap starts slowly, and samples are wild where q is above p.
    steps = 120 if loss in ("tv", "reverse-kl", "expected-length") else 60
    tail = "bucket" if loss == "reverse-kl" else "sampled"
    result = train(root, target, settings(arch=arch, objective={"loss": loss, "tail": tail}, steps=steps))
    assert result.loss_last < result.loss_first
    assert result.after[0].alpha > result.before[0].alpha + 0.05


@pytest.mark.parametrize("tail", ["drop", "bucket"])
def test_every_tail_rule_learns(root: Path, target: Path, tail: str) -> None:
    result = train(root, target, settings(objective={"tail": tail}))
    assert result.after[0].alpha > result.before[0].alpha + 0.05


@pytest.mark.parametrize("arch", DRAFTS)
def test_products_in_bfloat16_train_the_same_weights_nearly_as_well(root, target, tmp_path, arch: str) -> None:
    alphas, stored = [], []
    for precision in ("float32", "bfloat16"):
        result = train(root, target, settings(arch=arch, precision=precision), out=tmp_path / precision)
        alphas.append(sum(a.alpha for a in result.after) / 3)
        stored.append(load_file(tmp_path / precision / "model.safetensors"))
    whole, coarse = stored
    assert {name: w.dtype for name, w in coarse.items()} == {name: w.dtype for name, w in whole.items()}
    assert any(not torch.equal(coarse[name], w) for name, w in whole.items())
    assert abs(alphas[1] - alphas[0]) < 0.02


@pytest.mark.parametrize("loss", LOSSES)
def test_a_draft_that_copies_the_target_has_nothing_to_lose(root: Path, target: Path, loss: str) -> None:
    found = batch_loss(TableDraft(target), one_batch(root), Objective(loss=loss))
    assert found.loss.item() == pytest.approx(0, abs=1e-4)
    assert found.alphas == pytest.approx([1] * 6, abs=1e-4)


def test_exact_rows_are_those_that_were_stored(root: Path, target: Path) -> None:
    # The last layer's state is the row of logits itself, and the head the identity.
    rows_of = exact_rows(lambda states_RH: states_RH, torch.eye(32), 4)
    found = batch_loss(TableDraft(target), one_batch(root), Objective(loss="kl", tail="exact"), rows_of)
    assert found.loss.item() == pytest.approx(0, abs=1e-5)
    late = batch_loss(TableDraft(target, 1), one_batch(root), Objective(loss="kl", tail="exact"), rows_of)
    assert late.loss.item() > 1


def test_the_paper_gives_lambda_of_each_position_by_its_own_alpha(root: Path, target: Path) -> None:
    draft, batch = TableDraft(target, 1), one_batch(root)
    parts = {loss: batch_loss(draft, batch, Objective(loss=loss, gamma=1e-9)) for loss in ("kl", "tv", "lk-hybrid")}
    share = torch.exp(torch.tensor(-3 * parts["kl"].alphas[0]))
    expected = share * parts["kl"].loss + (1 - share) * parts["tv"].loss
    assert parts["lk-hybrid"].loss.item() == pytest.approx(expected.item(), rel=1e-4)
    fixed = batch_loss(draft, batch, Objective(kl_share=0.25, gamma=1e-9)).loss
    assert fixed.item() == pytest.approx((0.25 * parts["kl"].loss + 0.75 * parts["tv"].loss).item(), rel=1e-4)


def test_the_same_seed_trains_the_same_draft(root: Path, target: Path, tmp_path: Path) -> None:
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        train(root, target, settings(steps=5, seed=seed), out=tmp_path / name)
    assert weights(tmp_path / "first") == weights(tmp_path / "second") != weights(tmp_path / "other")


class StoppedError(Exception):
    """A training that was killed."""


@pytest.mark.parametrize("stop", [3, 11, 17])
def test_a_continued_training_is_the_uninterrupted_one_bit_for_bit(root, target, tmp_path, stop) -> None:
    how = settings(steps=20)
    whole = train(root, target, how, out=tmp_path / "whole")

    def fail(step: Step) -> None:
        if step.step == stop:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(root, target, how, out=tmp_path / "parts", checkpoint_every=3, on_step=fail)
    steps: list[Step] = []
    parts = train(root, target, how, out=tmp_path / "parts", checkpoint_every=3, on_step=steps.append)
    assert steps[0].step == stop // 3 * 3 + 1
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert msgspec.structs.replace(parts, seconds=0.0) == msgspec.structs.replace(whole, seconds=0.0)


def test_a_training_saved_with_other_settings_is_not_continued(root, target, tmp_path) -> None:
    def fail(step: Step) -> None:
        if step.step == 4:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(root, target, settings(), out=tmp_path, checkpoint_every=2, on_step=fail)
    with pytest.raises(MismatchError, match="delete the file"):
        train(root, target, settings(lr=0.5), out=tmp_path)
    with pytest.raises(UsageError, match="--out"):
        train(root, target, settings(), checkpoint_every=2)


def gradients_of(batches: list[Batch], target: Path, group: ProcessGroup | None) -> dict[str, torch.Tensor]:
    """The gradient of the mean KL of the first position over the rows of all batches, or of all ranks' one batch."""
    torch.manual_seed(0)
    draft = new_draft("eagle3", read_config(target), (1, 2), 1, None, target)
    found = [batch_loss(draft, batch, Objective(loss="kl"), group=group) for batch in batches]
    rows = sum(f.rows for f in found)
    torch.stack([f.loss * f.rows / rows for f in found]).sum().backward()
    weights = {name: w for name, w in draft.named_parameters() if w.requires_grad}
    if group is not None:
        average_gradients(list(weights.values()), group)
    return {name: w.grad for name, w in weights.items()}


def train_rank(rank: int, ranks: int, meeting: Path, root: Path, target: Path, out: Path) -> None:
    torch.set_num_threads(1)
    group = join_group(rank, ranks, meeting)
    batches = list(islice(ShardReader(root, layers=SHAPE.layers, batch_tokens=100), ranks))
    save_file(gradients_of([batches[rank]], target, group), out / f"gradients-{rank}.safetensors")
    train(root, target, settings(steps=4, batch_tokens=64, epochs=1), out=out / str(rank), group=group)
    leave_group()


def test_ranks_step_with_the_gradient_of_all_their_rows_and_one_of_them_writes(root, target, tmp_path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=train_rank, args=(rank, 2, tmp_path / "meeting", root, target, tmp_path))
             for rank in range(2)]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(300)
        assert [process.exitcode for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    batches = list(islice(ShardReader(root, layers=SHAPE.layers, batch_tokens=100), 2))
    expected = gradients_of(batches, target, None)
    for rank in range(2):
        for name, gradient in load_file(tmp_path / f"gradients-{rank}.safetensors").items():
            assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-6), name
    assert (tmp_path / "0" / "model.safetensors").exists()
    assert not (tmp_path / "1").exists()


def test_a_draft_vocabulary_holds_what_the_target_expects_most(root: Path, target: Path, tmp_path: Path) -> None:
    reader = ShardReader(root)
    vocabulary = frequent_vocabulary(reader, 12)
    mass_V = torch.zeros(32)
    for batch in reader:
        mass_V += torch.from_numpy(table())[batch.token_ids_T[batch.rows_R]].softmax(1).sum(0)
    # The head holds 8 of 32 tokens here, so the two orders agree on most.
    assert len(set(vocabulary.d2t_D.tolist()) & set(mass_V.topk(12).indices.tolist())) >= 10
    result = train(root, target, settings(draft_vocab=12), out=tmp_path)
    assert result.draft_vocab == 12
    assert result.after[0].alpha > result.before[0].alpha
    assert load_draft(tmp_path, target).vocabulary.size == 12


@pytest.mark.parametrize("epochs", [1, 2])
def test_epochs_are_counted_when_no_steps_are_given(root: Path, target: Path, epochs: int) -> None:
    seen: list[Step] = []
    result = train(root, target, TrainSettings(positions=1, epochs=epochs, batch_tokens=256), on_step=seen.append)
    reader = ShardReader(root, batch_tokens=256, split="train")
    assert result.steps == sum(reader.at_epoch(epoch).num_steps() for epoch in range(epochs))
    assert seen[-1].progress == 1


@pytest.mark.parametrize("left", [1, 0])
def test_a_training_goes_on_in_its_last_epoch(root: Path, target: Path, tmp_path: Path, left: int) -> None:
    short = TrainSettings(positions=1, epochs=2, batch_tokens=256)
    steps = train(root, target, short, out=tmp_path / "whole").steps

    def stop(step: Step) -> None:
        if step.step == steps - left:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(root, target, short, out=tmp_path / "parts", checkpoint_every=1, on_step=stop)
    assert train(root, target, short, out=tmp_path / "parts").steps == steps
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_what_cannot_be_trained_is_refused_with_a_reason(root: Path, target: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "other", 10, Shape(vocab_size=48))
    with pytest.raises(UsageError, match="vocabulary 32; the dataset's target has 8 and 48"):
        train(tmp_path / "other", target)
    make_dataset(tmp_path / "bare", 10, Shape(vocab_size=32, hidden_size=32, layers=()))
    with pytest.raises(UsageError, match="no hidden states"):
        train(tmp_path / "bare", target)
    with pytest.raises(UsageError, match="held out"):
        train(root, target, settings(holdout_every=1000))
    with pytest.raises(UsageError, match=r"config\.json"):
        train(root, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UsageError, match="safetensors"):
        train(root, tmp_path)


def test_the_learning_rate_warms_up_and_comes_down_to_zero() -> None:
    assert [learning_rate_share(step, step / 1000, 100) for step in (50, 1000)] == pytest.approx([0.5, 0], abs=0.01)
    assert learning_rate_share(500, 0.5, 100) == pytest.approx(0.5)
    # A short training warms up for a tenth of itself.
    assert learning_rate_share(1, 0.05, 100) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("how", [{"steps": 1}, {"steps": 3}, {"steps": None, "epochs": 1, "batch_tokens": 10**7}])
def test_the_last_step_still_trains_and_the_only_one_too(root: Path, target: Path, how: dict[str, object]) -> None:
    seen: list[Step] = []
    result = train(root, target, settings(**how), on_step=seen.append)
    assert min(step.lr for step in seen) > 1e-4
    assert seen[-1].progress == 1
    assert result.after[0].alpha != result.before[0].alpha
