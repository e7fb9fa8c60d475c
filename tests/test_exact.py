"""Catches an exact target that is not the target's own distribution, or that is held whole.

Shapes: R rows, H hidden size, V vocabulary.
"""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from dense_losses import combine, exact_terms, logits
from tiny_datasets import start_run
from torch import Tensor

from distill_pipe.consume import (
    DraftVocabulary,
    ExactTarget,
    FusedLogits,
    SparseTarget,
    final_norm,
    kl_loss,
    lk_alpha_loss,
    lk_hybrid_loss,
    reverse_kl_loss,
    tv_loss,
)
from distill_pipe.errors import DamageError, UsageError
from distill_pipe.store.manifest import RUN, encode_record
from distill_pipe.store.norm import write_final_norm
from distill_pipe.store.root import LocalRoot

LOSSES = {"kl": kl_loss, "reverse_kl": reverse_kl_loss, "tv": tv_loss, "lk_alpha": lk_alpha_loss,
          "lk_hybrid": lk_hybrid_loss}
R, H, V = 11, 8, 40


def target_parts() -> tuple[Tensor, Tensor, torch.nn.RMSNorm]:
    norm = torch.nn.RMSNorm(H, 1e-5).requires_grad_(False)
    norm.weight.copy_(1 + logits(1, H, seed=1, scale=0.2)[0])
    return logits(R, H, seed=2, scale=30.0), logits(V, H, seed=3, scale=0.8), norm


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_the_textbook_over_the_whole_vocabulary(name: str, truncated: bool,
                                                                         temperature: float) -> None:
    states_RH, head_VH, norm = target_parts()
    vocabulary = DraftVocabulary.from_ids(torch.arange(0, V, 3), V) if truncated else None
    draft_RD = logits(R, V if vocabulary is None else vocabulary.size, seed=4)
    target_RV = norm(states_RH) @ head_VH.T
    leaf_RD = draft_RD.clone().requires_grad_()
    output = LOSSES[name](leaf_RD, ExactTarget(states_RH, head_VH, norm, chunk_rows=4), tail="exact",
                          vocabulary=vocabulary, temperature=temperature)
    output.loss.backward()
    exact_RD = draft_RD.double().requires_grad_()
    expected = combine(name, exact_terms(exact_RD, target_RV, vocabulary, temperature))
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(leaf_RD.grad.double(), exact_RD.grad, rtol=1e-3, atol=1e-7)
    assert torch.equal(output.alpha_lower_R, output.alpha_R)
    assert torch.equal(output.alpha_upper_R, output.alpha_R)


def test_weights_and_fused_logits_are_those_of_every_other_rule() -> None:
    states_RH, head_VH, norm = target_parts()
    target = ExactTarget(states_RH, head_VH, norm, chunk_rows=3)
    weights_R = torch.arange(R).float()
    draft_RH, weight_VH = logits(R, 6, seed=5), logits(V, 6, seed=6)
    plain = [x.clone().requires_grad_() for x in (draft_RH, weight_VH)]
    fused = [x.clone().requires_grad_() for x in (draft_RH, weight_VH)]
    one = lk_hybrid_loss(plain[0] @ plain[1].T, target, tail="exact", weights_R=weights_R)
    other = lk_hybrid_loss(FusedLogits(*fused), target, tail="exact", weights_R=weights_R)
    torch.autograd.backward([one.loss, other.loss])
    whole = SparseTarget.from_logits(target.logits(slice(0, R)), V, 0)
    stored = lk_hybrid_loss(draft_RH @ weight_VH.T, whole, tail="drop", weights_R=weights_R)
    assert one.loss.item() == pytest.approx(stored.loss.item(), rel=1e-5)
    assert one.loss.item() == pytest.approx(other.loss.item(), rel=1e-6)
    for a, b in zip(plain, fused, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)
    assert (fused[0].grad[0] == 0).all()


def test_no_more_than_a_chunk_of_target_logits_is_ever_computed() -> None:
    states_RH, head_VH, norm = target_parts()
    seen: list[int] = []

    def counted(states: Tensor) -> Tensor:
        seen.append(len(states))
        return norm(states)

    draft_RV = logits(R, V, seed=4).requires_grad_()
    kl_loss(draft_RV, ExactTarget(states_RH, head_VH, counted, chunk_rows=4), tail="exact").loss.backward()
    assert sorted(seen) == [3, 3, 4, 4, 4, 4]


def test_no_rows_give_a_loss_of_zero() -> None:
    states_RH, head_VH, norm = target_parts()
    draft_RV = torch.zeros(0, V, requires_grad=True)
    output = tv_loss(draft_RV, ExactTarget(states_RH[:0], head_VH, norm), tail="exact")
    output.loss.backward()
    assert output.loss.item() == 0
    assert draft_RV.grad.shape == (0, V)


def norm_dataset(root: Path, architecture: str, eps: float | None) -> None:
    run = start_run(root, 2)
    target = msgspec.structs.replace(run.spec.target, architecture=architecture, final_norm_eps=eps)
    spec = msgspec.structs.replace(run.spec, target=target)
    changed = msgspec.structs.replace(run, spec=spec, fingerprint=spec.fingerprint)
    LocalRoot(root).publish_bytes(encode_record(changed), RUN)


def test_the_norm_of_a_dataset_is_the_targets(tmp_path: Path) -> None:
    norm_dataset(tmp_path, "LlamaForCausalLM", 1e-5)
    with pytest.raises(DamageError, match="final_norm"):
        final_norm(tmp_path)
    weight_H = np.linspace(0.5, 1.5, H, dtype=np.float32)
    write_final_norm(LocalRoot(tmp_path), weight_H)
    states_RH, _, _ = target_parts()
    mean_R1 = states_RH.square().mean(1, keepdim=True)
    expected_RH = states_RH * (mean_R1 + 1e-5).rsqrt() * torch.from_numpy(weight_H)
    norm = final_norm(tmp_path)
    assert torch.allclose(norm(states_RH), expected_RH, rtol=1e-5)
    assert not norm.weight.requires_grad


def test_a_norm_that_is_not_known_to_be_plain_is_refused(tmp_path: Path) -> None:
    norm_dataset(tmp_path / "a", "Gemma3ForCausalLM", 1e-6)
    with pytest.raises(UsageError, match="Gemma3ForCausalLM"):
        final_norm(tmp_path / "a")
    norm_dataset(tmp_path / "b", "LlamaForCausalLM", None)
    with pytest.raises(UsageError, match="epsilon"):
        final_norm(tmp_path / "b")


def test_targets_and_rules_that_do_not_fit_are_refused() -> None:
    states_RH, head_VH, norm = target_parts()
    draft_RV = logits(R, V, seed=4)
    with pytest.raises(UsageError, match="tail='sampled' does not fit"):
        kl_loss(draft_RV, ExactTarget(states_RH, head_VH, norm))
    with pytest.raises(UsageError, match="tail='exact' does not fit"):
        kl_loss(draft_RV, SparseTarget.from_logits(draft_RV, 4, 2), tail="exact")
    with pytest.raises(UsageError, match="lm_head"):
        ExactTarget(states_RH, head_VH[:, 1:], norm)
    with pytest.raises(UsageError, match="chunk_rows"):
        ExactTarget(states_RH, head_VH, norm, chunk_rows=0)
