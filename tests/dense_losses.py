"""Oracles for the losses: the definitions of arXiv 2602.23881 over whole vocabularies, in float64, for autograd.

Shapes: R rows, K head entries, M samples, V vocabulary.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distill_pipe.consume import DraftVocabulary, SparseTarget

ETA = 3.0


def logits(rows: int, vocab: int, seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def ordinary_rows() -> tuple[Tensor, Tensor]:
    target_RV = logits(6, 40, seed=1)
    return target_RV, target_RV + logits(6, 40, seed=2, scale=1.0)


def disjoint_rows() -> tuple[Tensor, Tensor]:
    target_RV, draft_RV = logits(4, 40, seed=3), logits(4, 40, seed=4)
    target_RV[:, :20] += 25
    draft_RV[:, 20:] += 25
    return target_RV, draft_RV


def saturated_rows() -> tuple[Tensor, Tensor]:
    signs_RV, other_RV = logits(5, 40, seed=5).sign(), logits(5, 40, seed=6).sign()
    jitter_RV = logits(5, 40, seed=7, scale=0.1)
    return 30 * signs_RV + jitter_RV, 30 * other_RV - jitter_RV


def draft_in_the_tail() -> tuple[Tensor, Tensor]:
    target_RV = logits(5, 40, seed=8)
    return target_RV, logits(5, 40, seed=9) - 12 * target_RV


def target_in_the_tail() -> tuple[Tensor, Tensor]:
    return logits(5, 400, seed=10, scale=0.05), logits(5, 400, seed=11, scale=0.5)


CASES = {f.__name__: f for f in (ordinary_rows, disjoint_rows, saturated_rows, draft_in_the_tail, target_in_the_tail)}


class Terms(NamedTuple):
    """What the losses are means of."""

    kl_R: Tensor
    reverse_kl_R: Tensor
    alpha_R: Tensor


def dense_terms(draft_RD: Tensor, target: SparseTarget, tail: str, vocabulary: DraftVocabulary | None = None,
                temperature: float = 1.0) -> Terms:
    """KL both ways and alpha of each row of float64 logits, by the definition of each tail rule."""
    rows = [_row(z_D / temperature, target, r, tail, vocabulary, temperature) for r, z_D in enumerate(draft_RD)]
    return Terms(*(torch.stack(column) for column in zip(*rows, strict=True)))


def exact_terms(draft_RD: Tensor, target_RV: Tensor, vocabulary: DraftVocabulary | None = None,
                temperature: float = 1.0) -> Terms:
    """The same from the whole of the target's logits, by the textbook."""
    p_RD = (target_RV.double() / temperature).softmax(1)
    p_RD = p_RD if vocabulary is None else p_RD[:, vocabulary.d2t_D]
    q_RD, inside_RD = (draft_RD / temperature).softmax(1), p_RD / p_RD.sum(1, keepdim=True)
    return Terms((inside_RD * (inside_RD / q_RD).log()).sum(1), (q_RD * (q_RD / inside_RD).log()).sum(1),
                 torch.minimum(p_RD, q_RD).sum(1))


def _row(z_D: Tensor, target: SparseTarget, r: int, tail: str, vocabulary: DraftVocabulary | None,
         temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    logq_D, mass = z_D.log_softmax(0), target.tail_mass_R[r].double()
    ids_K, ids_M = (ids[r][ids[r] >= 0] for ids in (target.topk_ids_RK, target.tail_ids_RM))
    p_K, p_M = (target.topk_logprobs_RK[r][:len(ids_K)].double().exp(),
                target.tail_logprobs_RM[r][:len(ids_M)].double().exp())
    weight_M = mass / len(ids_M) / p_M
    powers_K, powers_M = p_K ** (1 / temperature), p_M ** (1 / temperature)
    normaliser = powers_K.sum() + (weight_M * powers_M).sum() if temperature != 1 else torch.tensor(1.0).double()
    p_K, p_M = powers_K / normaliser, powers_M / normaliser
    mass = (weight_M * p_M).sum() if temperature != 1 else mass
    draft_K, draft_M = (ids if vocabulary is None else vocabulary.t2d_V[ids] for ids in (ids_K, ids_M))
    in_head_D = torch.zeros_like(z_D, dtype=torch.bool)
    in_head_D[draft_K[draft_K >= 0]] = True
    # Lists of p, weight, log q.
    entries = [(p_K[draft_K >= 0], torch.ones_like(p_K)[draft_K >= 0], logq_D[draft_K[draft_K >= 0]])]
    inside = p_K[draft_K >= 0].sum()
    if tail == "sampled":
        entries.append((p_M[draft_M >= 0], weight_M[draft_M >= 0], logq_D[draft_M[draft_M >= 0]]))
        inside = inside + (weight_M * p_M)[draft_M >= 0].sum()
    elif not in_head_D.all():
        inside = inside + mass
    if tail == "bucket" and not in_head_D.all():
        # The logsumexp over the tail alone, because 1 - sum(q) is inexact even in float64 on saturated rows.
        log_outside = z_D.masked_fill(in_head_D, -math.inf).logsumexp(0) - z_D.logsumexp(0)
        entries.append((mass[None], torch.ones(1).double(), log_outside[None]))
    p, weight, logq = (torch.cat(column) for column in zip(*entries, strict=True))
    inside_p = p / inside if vocabulary is not None else p
    kl = (weight * inside_p * (inside_p.log() - logq)).sum()
    reverse_kl = (weight * (logq.exp() * (logq - inside_p.log()) - logq.exp() + inside_p)).sum()
    return kl, reverse_kl, (weight * torch.minimum(p, logq.exp())).sum()


def combine(name: str, terms: Terms) -> Tensor:
    """The losses from the terms of all rows."""
    kl_R, reverse_kl_R, alpha_R = terms
    share = math.exp(-ETA * alpha_R.mean().item())
    losses_R = {"kl": kl_R, "reverse_kl": reverse_kl_R, "tv": 1 - alpha_R, "lk_alpha": -alpha_R.log(),
                "lk_hybrid": share * kl_R + (1 - share) * (1 - alpha_R)}
    return losses_R[name].mean()


def sparse(target_RV: Tensor, top_k: int = 8, samples: int = 4, seed: int = 0) -> SparseTarget:
    return SparseTarget.from_logits(target_RV, top_k, samples, torch.Generator().manual_seed(seed))


def whole(target_RV: Tensor) -> SparseTarget:
    return sparse(target_RV, top_k=target_RV.shape[1], samples=0)
