"""Catches a draft vocabulary that is chosen or mapped wrongly, and losses that lose or invent the mass outside it.

Shapes: R rows, V vocabulary, D draft vocabulary.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_losses import combine, dense_terms, exact_terms, logits, ordinary_rows, sparse, whole
from tiny_datasets import Shape, make_dataset

from distill_pipe.consume import (
    DraftVocabulary,
    ShardReader,
    SparseTarget,
    kl_loss,
    lk_alpha_loss,
    lk_hybrid_loss,
    reverse_kl_loss,
    tv_loss,
)
from distill_pipe.errors import MismatchError, UsageError
from distill_pipe.store.finalize import SUCCESS, finalize
from distill_pipe.store.root import LocalRoot

LOSSES = {"kl": kl_loss, "reverse_kl": reverse_kl_loss, "tv": tv_loss, "lk_alpha": lk_alpha_loss,
          "lk_hybrid": lk_hybrid_loss}


def some_of_40() -> DraftVocabulary:
    """Every third token is missing, and the draft's order is not the target's."""
    return DraftVocabulary.from_ids(torch.tensor([t for t in reversed(range(40)) if t % 3]), 40)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("tail", ["sampled", "drop", "bucket"])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_the_dense_definition(name: str, tail: str, temperature: float) -> None:
    target_RV, draft_RV = ordinary_rows()
    vocabulary, target = some_of_40(), sparse(target_RV, samples=6)
    leaf_RD = draft_RV[:, vocabulary.d2t_D].clone().requires_grad_()
    output = LOSSES[name](leaf_RD, target, tail=tail, vocabulary=vocabulary, temperature=temperature)
    output.loss.backward()
    exact_RD = leaf_RD.detach().double().requires_grad_()
    expected = combine(name, dense_terms(exact_RD, target, tail, vocabulary, temperature))
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=2e-5, abs=1e-6)
    assert torch.allclose(leaf_RD.grad.double(), exact_RD.grad, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_whole_head_gives_the_papers_loss_true_p_for_alpha_and_renormalised_p_for_kl(name: str) -> None:
    target_RV, draft_RV = ordinary_rows()
    vocabulary = some_of_40()
    exact_RD = draft_RV[:, vocabulary.d2t_D].double()
    terms = exact_terms(exact_RD, target_RV, vocabulary)
    for tail in ("sampled", "drop", "bucket"):
        output = LOSSES[name](exact_RD.float(), whole(target_RV), tail=tail, vocabulary=vocabulary)
        assert output.loss.item() == pytest.approx(combine(name, terms).item(), rel=1e-5)
        assert output.alpha.item() == pytest.approx(terms.alpha_R.mean().item(), rel=1e-5)
    inside_R = target_RV.softmax(1)[:, vocabulary.d2t_D].sum(1)
    assert (output.alpha_R < inside_R).all(), "what lies outside is never accepted"


@pytest.mark.parametrize("name", LOSSES)
def test_the_whole_vocabulary_in_another_order_changes_nothing(name: str) -> None:
    target_RV, draft_RV = ordinary_rows()
    order = DraftVocabulary.from_ids(torch.arange(39, -1, -1), 40)
    for tail in ("drop", "bucket"):
        plain = LOSSES[name](draft_RV, sparse(target_RV), tail=tail)
        turned = LOSSES[name](draft_RV.flip(1), sparse(target_RV), tail=tail, vocabulary=order)
        assert turned.loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)
        assert torch.allclose(turned.alpha_upper_R, plain.alpha_upper_R, atol=1e-6)


@pytest.mark.parametrize("tail", ["sampled", "drop", "bucket"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_row_of_which_nothing_is_inside_adds_nothing_but_its_lost_acceptance(name: str, tail: str) -> None:
    target_RV = logits(2, 40, seed=0)
    target_RV[1, :20] += 90
    vocabulary = DraftVocabulary.from_ids(torch.arange(20, 40), 40)
    target = sparse(target_RV)
    lost = SparseTarget(target.topk_ids_RK, target.topk_logprobs_RK, torch.tensor([target.tail_mass_R[0], 0.0]),
                        target.tail_ids_RM, target.tail_logprobs_RM, 40)
    leaf_RD = logits(2, 20, seed=1).requires_grad_()
    output = LOSSES[name](leaf_RD, lost, tail=tail, vocabulary=vocabulary)
    output.loss.backward()
    assert math.isfinite(output.loss.item())
    assert leaf_RD.grad.isfinite().all()
    if tail != "bucket":
        alone = LOSSES[name](leaf_RD[:1], lost[:1], tail=tail, vocabulary=vocabulary)
        if name != "lk_hybrid":
            assert output.loss.item() == pytest.approx((alone.loss.item() + (name == "tv")) / 2, rel=1e-5)
        assert (leaf_RD.grad[1] == 0).all()
        assert output.alpha_R[1] == 0


def test_the_most_frequent_tokens_are_chosen_and_mapped_both_ways() -> None:
    vocabulary = DraftVocabulary.most_frequent(np.array([5, 0, 7, 5, 9, 0]), 3)
    assert vocabulary.d2t_D.tolist() == [0, 2, 4]
    assert vocabulary.t2d_V.tolist() == [0, -1, 1, -1, 2, -1]
    assert (vocabulary.size, vocabulary.vocab_size) == (3, 6)


def test_a_finalized_dataset_gives_the_tokens_with_most_mass(tmp_path: Path) -> None:
    run = make_dataset(tmp_path, num_prompts=6)
    with pytest.raises(UsageError, match="finalize"):
        DraftVocabulary.from_dataset(tmp_path, 16)
    finalize(LocalRoot(tmp_path))
    mass_V = np.zeros(64)
    for batch in ShardReader(tmp_path):
        target = batch.target
        weight_R1 = (target.tail_mass_R / (target.tail_ids_RM >= 0).sum(1).clamp(min=1))[:, None]
        for ids, mass in ((target.topk_ids_RK, target.topk_logprobs_RK.exp()),
                          (target.tail_ids_RM, weight_R1.expand_as(target.tail_ids_RM))):
            np.add.at(mass_V, ids[ids >= 0].numpy(), mass[ids >= 0].numpy())
    vocabulary = DraftVocabulary.from_dataset(tmp_path, 16)
    assert vocabulary.d2t_D.tolist() == sorted(np.argsort(-mass_V)[:16].tolist())
    assert DraftVocabulary.from_dataset(tmp_path, 64).d2t_D.tolist() == list(range(64))
    with pytest.raises(UsageError, match="65"):
        DraftVocabulary.from_dataset(tmp_path, 65)
    assert run.spec.target.vocab_size == vocabulary.vocab_size


def test_tokens_that_never_occur_fill_up_a_vocabulary(tmp_path: Path) -> None:
    make_dataset(tmp_path, num_prompts=1, shape=Shape(vocab_size=5000, tail_samples=2))
    finalize(LocalRoot(tmp_path))
    vocabulary = DraftVocabulary.from_dataset(tmp_path, 2500)
    assert vocabulary.size == 2500
    assert (vocabulary.d2t_D.diff() > 0).all()
    assert set(DraftVocabulary.from_dataset(tmp_path, 20).d2t_D.tolist()) <= set(vocabulary.d2t_D.tolist())


def test_statistics_of_another_run_are_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", num_prompts=2)
    make_dataset(tmp_path / "b", num_prompts=2, shape=Shape(top_k=4))
    finalize(LocalRoot(tmp_path / "a"))
    finalize(LocalRoot(tmp_path / "b"))
    (tmp_path / "a" / SUCCESS).write_bytes((tmp_path / "b" / SUCCESS).read_bytes())
    with pytest.raises(MismatchError, match="another run"):
        DraftVocabulary.from_dataset(tmp_path / "a", 8)


def test_vocabularies_that_do_not_fit_are_refused() -> None:
    target_RV, draft_RV = ordinary_rows()
    for ids in ([], [1, 1], [40], [-1]):
        with pytest.raises(UsageError, match="draft vocabulary"):
            DraftVocabulary.from_ids(torch.tensor(ids, dtype=torch.int64), 40)
    with pytest.raises(UsageError, match="the draft vocabulary"):
        kl_loss(draft_RV, sparse(target_RV), vocabulary=some_of_40())
    with pytest.raises(UsageError, match="part of 50 tokens"):
        kl_loss(draft_RV, sparse(target_RV), vocabulary=DraftVocabulary.from_ids(torch.arange(40), 50))
