"""How often a draft's tokens would be accepted, measured on stored rows: per step, and along chains of steps.

For every token index t of a batch and every step k that is asked for, `RowAcceptance` holds what the row at t+1+k says
of the draft's output there. `evaluate` sums chains of them, `train` only their means.

Shapes: T tokens, K draft steps, R rows, D draft vocabulary, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from distill_pipe.consume.comparison import TailRule
from distill_pipe.consume.drafts.draft import Draft, drafted_rows
from distill_pipe.consume.losses import tv_loss
from distill_pipe.consume.reader import Batch, ShardReader
from distill_pipe.consume.sparse import SparseTarget
from distill_pipe.errors import UsageError

# Rows whose logits are alive at once.
CHUNK_ROWS = 512


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    """Mean acceptance rate of one draft position over `rows` held-out rows, and the bounds it lies between."""

    alpha: float
    lower: float
    upper: float
    rows: int


@dataclass(frozen=True, slots=True, eq=False)
class RowAcceptance:
    """Values of `drafted` anchors at each step; 0 elsewhere.

    `alpha_KT` follows the tail rule and lies between `lower_KT` and `upper_KT` up to the noise of the tail samples.
    `passed_KT` is min(1, q(x) / p(x)) of the token x that was written, the chance that it is accepted when it is
    drafted, weighted by how often it is; at T = 1, whatever the temperature of the rest. `match_KT` is 1 where draft
    and target have the same likeliest token.
    """

    drafted_KT: Tensor
    alpha_KT: Tensor
    lower_KT: Tensor
    upper_KT: Tensor
    passed_KT: Tensor
    match_KT: Tensor


@torch.no_grad()
def row_acceptance(draft: Draft, batch: Batch, steps: int, tail: TailRule, temperature: float = 1.0) -> RowAcceptance:
    """Compare every step's outputs with the rows they are to be compared with."""
    shape = (steps, len(batch.token_ids_T))
    found = {name: torch.zeros(shape, device=draft.device) for name in RowAcceptance.__slots__}
    for k, states_TH in enumerate(draft(batch, steps)):
        index_R, row_R = drafted_rows(batch, k)
        for start in range(0, len(row_R), CHUNK_ROWS):
            at_R, rows_R = index_R[start:start + CHUNK_ROWS], row_R[start:start + CHUNK_ROWS]
            logits_RD = draft.logits(states_TH[at_R], k)
            target = batch.target[rows_R]
            output = tv_loss(logits_RD, target, tail=tail, vocabulary=draft.vocabulary, temperature=temperature)
            found["drafted_KT"][k, at_R] = 1.0
            found["alpha_KT"][k, at_R] = output.alpha_R
            found["lower_KT"][k, at_R] = output.alpha_lower_R
            found["upper_KT"][k, at_R] = output.alpha_upper_R
            found["passed_KT"][k, at_R] = _passed(draft, logits_RD, batch.next_ids_R[rows_R],
                                                  batch.next_logprob_R[rows_R])
            found["match_KT"][k, at_R] = _matches(draft, logits_RD, target)
    return RowAcceptance(**found)


def heldout_acceptance(draft: Draft, reader: ShardReader, tail: TailRule) -> tuple[Acceptance, ...]:
    """The acceptance rate of each trained position over everything that `reader` yields.

    Raises:
        UsageError: there is nothing to evaluate on.
    """
    totals_K4 = torch.zeros(draft.positions, 4, dtype=torch.float64)
    for batch in _on(draft, reader):
        found = row_acceptance(draft, batch, draft.positions, tail)
        parts = (found.alpha_KT, found.lower_KT, found.upper_KT, found.drafted_KT)
        totals_K4 += torch.stack([part_KT.double().sum(1) for part_KT in parts], 1).cpu()
    if not totals_K4[0, 3]:
        raise UsageError("no row to evaluate a draft on: too few traces are held out (see holdout_every)")
    return tuple(Acceptance(alpha=alpha / max(rows, 1), lower=lower / max(rows, 1), upper=upper / max(rows, 1),
                            rows=int(rows)) for alpha, lower, upper, rows in totals_K4.tolist())


def _on(draft: Draft, reader: ShardReader) -> Iterator[Batch]:
    for batch in reader:
        yield batch.to(draft.device)


def _passed(draft: Draft, logits_RD: Tensor, next_ids_R: Tensor, next_logprob_R: Tensor) -> Tensor:
    ids_R = next_ids_R if draft.vocabulary is None else draft.vocabulary.t2d_V[next_ids_R]
    logits_RD = logits_RD.float()
    logq_R = logits_RD.gather(1, ids_R.clamp(min=0)[:, None])[:, 0] - logits_RD.logsumexp(1)
    return torch.where(ids_R >= 0, (logq_R - next_logprob_R).exp().clamp(max=1.0), 0.0)


def _matches(draft: Draft, logits_RD: Tensor, target: SparseTarget) -> Tensor:
    best_R = logits_RD.argmax(1)
    if draft.vocabulary is not None:
        best_R = draft.vocabulary.d2t_D[best_R]
    # The head is stored in descending order.
    return (best_R == target.topk_ids_RK[:, 0]).float()
