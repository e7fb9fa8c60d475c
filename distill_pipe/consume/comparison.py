"""Row by row, how far a draft's distribution q is from the target's p: what every loss is a mean of.

    alpha = sum_v min(p_v, q_v)        the chance that a drafted token is accepted, and 1 - TV(p, q)

p is over the target's whole vocabulary, q = softmax(draft logits) over the draft's. Of p only the head S is stored
entry by entry; its mass outside, P, is known and sampled. Four rules say what stands in for the tail:

| tail      | alpha                                              | KL(p || q)                             |            |
|-----------|----------------------------------------------------|----------------------------------------|------------|
| `sampled` | D + P mean_{x ~ p_tail} min(1, q_x / p_x)          | head + P mean_{x ~ p_tail} log p_x/q_x | unbiased   |
| `drop`    | D = sum_S min(p, q)                                | head = sum_S p log p/q                 | alpha low  |
| `bucket`  | D + min(P, Q), with Q = 1 - sum_S q                | head + P log P/Q                       | alpha high |
| `exact`   | all tokens, from the target's own logits           | the same                               | exact      |

Nothing is renormalised: a renormalised head has another optimum than p. A row's sampled alpha may exceed its upper
bound, or 1; clamping it would bias the mean.

A draft vocabulary smaller than the target's (arXiv 2602.23881 section 4.4): tokens outside have q = 0. alpha keeps the
true p, so they are lost for good; both KL take p renormalised inside. What share of p lies inside is exact for the
head, and for the tail it is that of the samples (a ratio of estimates: KL is then only nearly unbiased). Under `drop`
and `bucket` the whole tail counts as inside, and `drop` leaves out what it would add to KL. A row of which nothing is
inside has alpha 0 and adds 0 to every loss but TV.

Bounds hold under every rule: see `bounds`. They are reported, not optimised.

Everything is float32, also under autocast, and in log space: `log alpha` is a logsumexp of `min(log p, log q)`, so a
row on which p and q hardly overlap has a finite loss and a live gradient.

Shapes: R rows, K head entries, M tail samples, X entries of any kind, D draft vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill_pipe.consume.bounds import alpha_bounds
from distill_pipe.consume.entries import Entries, Rows, log_inside
from distill_pipe.consume.exact import ExactTarget
from distill_pipe.consume.fused import FusedLogits
from distill_pipe.consume.lookup import LOG_NOTHING, Query, look_up, working_dtype
from distill_pipe.consume.sparse import SparseTarget
from distill_pipe.consume.stored import StoredRows
from distill_pipe.consume.vocabulary import DraftVocabulary
from distill_pipe.errors import UsageError

TailRule = Literal["sampled", "drop", "bucket", "exact"]
DraftLogits = Tensor | FusedLogits
Target = SparseTarget | ExactTarget


@dataclass(frozen=True, slots=True)
class Comparing:
    """How rows are compared: the tail rule, the draft's vocabulary where it is smaller, and the temperature."""

    tail: TailRule
    vocabulary: DraftVocabulary | None = None
    temperature: float = 1.0


def compare(draft: DraftLogits, target: Target, how: Comparing, weights_R: Tensor) -> Rows:
    """Compare each row of the target with the draft's. Rows of weight 0 may hold anything finite.

    Raises:
        UsageError: the arguments do not fit each other, or the target cannot answer what is asked of it.
    """
    _require_fit(draft, target, how, weights_R)
    run: Callable[..., Rows] = _compare_exact if isinstance(target, ExactTarget) else _compare_stored
    if torch.compiler.is_compiling():
        # Loops over pieces would be unrolled. Not a decorator, which takes a second when this module is imported.
        run = torch.compiler.disable(run)  # type: ignore[no-untyped-call]
    return run(draft, target, how, weights_R)


def _compare_stored(draft: DraftLogits, target: SparseTarget, how: Comparing, weights_R: Tensor) -> Rows:
    stored = StoredRows.of(target, weights_R, working_dtype(draft.dtype))
    at = stored.at(how.temperature)
    width = stored.held_RX.shape[1] if how.tail == "sampled" else stored.num_head
    ids_RX, held_RX = stored.ids_RX[:, :width].clamp(min=0), stored.held_RX[:, :width]
    if how.vocabulary is not None:
        ids_RX = how.vocabulary.t2d_V[ids_RX]
        ids_RX, held_RX = ids_RX.clamp(min=0), held_RX & (ids_RX >= 0)
    query = Query(ids_RX, held_RX, at.cap_R.exp(), how.temperature, outside=how.tail == "bucket")
    logq_RX, capped_R = draft.look_up(query) if isinstance(draft, FusedLogits) else look_up(draft, query)
    logp_RX = torch.where(held_RX, stored.logp_RX[:, :width] / how.temperature - at.z_R[:, None], 0.0)
    logw_RX = torch.where(held_RX, stored.logw_RX[:, :width], 0.0)
    entries = Entries(held_RX, logp_RX, logw_RX, logq_RX[:, :width], torch.zeros_like(at.z_R))
    head_RK = slice(None), slice(stored.num_head)
    bounds = alpha_bounds(at, torch.where(held_RX[head_RK], logq_RX[head_RK].detach().exp(), 0.0), capped_R)
    # A tail is only there for the draft if it has tokens that are not in the head.
    has_tail_R = (stored.tail_tokens_R > 0) & (held_RX[:, :stored.num_head].sum(1) < draft.shape[1])
    if how.tail == "bucket":
        entries = _with_bucket(entries, at.tail_mass_R, has_tail_R, logq_RX[:, -1:])
    if how.vocabulary is not None:
        log_mass_RX, counted_RX = entries.logp_RX + entries.logw_RX, entries.held_RX
        if how.tail == "drop":
            log_mass_RX = torch.cat([log_mass_RX, at.tail_mass_R[:, None]], 1)
            counted_RX = torch.cat([counted_RX, (has_tail_R & counted_RX.any(1))[:, None]], 1)
        entries = replace(entries, log_inside_R=log_inside(counted_RX, log_mass_RX))
    return entries.rows(*bounds)


def _compare_exact(draft: DraftLogits, target: ExactTarget, how: Comparing, weights_R: Tensor) -> Rows:
    """A chunk of rows at a time, once for the loss and once for its gradient: only row numbers are kept in between."""
    def chunk(part: DraftLogits, rows: slice) -> tuple[Tensor, ...]:
        logits_CD = part.logits() if isinstance(part, FusedLogits) else part
        dtype = working_dtype(logits_CD.dtype)
        logq_CD = (logits_CD.to(dtype) / how.temperature).log_softmax(1)
        logp_CD = (target.logits(rows).to(dtype) / how.temperature).log_softmax(1)
        if how.vocabulary is not None:
            logp_CD = logp_CD[:, how.vocabulary.d2t_D]
        held_CD = (weights_R[rows, None] > 0).expand_as(logp_CD)
        inside_C = log_inside(held_CD, logp_CD) if how.vocabulary is not None else torch.zeros_like(logp_CD[:, 0])
        made = Entries(held_CD, logp_CD, torch.zeros_like(logp_CD), logq_CD, inside_C)
        return made.kl(), made.reverse_kl(), made.log_alpha(), held_CD[:, 0]

    # One split, whose gradient is joined once; a slice would fill a gradient of the size of all logits for each chunk.
    drafts = (torch.split(draft, target.chunk_rows) if isinstance(draft, Tensor)
              else [draft[rows] for rows in target.chunks()])
    parts = [checkpoint(chunk, part, rows, use_reentrant=False, preserve_rng_state=False)
             for part, rows in zip(drafts, target.chunks(), strict=True)]
    kl_R, reverse_kl_R, log_alpha_R, usable_R = (torch.cat(column) for column in zip(*parts, strict=True))
    alpha_R = log_alpha_R.detach().exp()
    return Rows(kl_R, reverse_kl_R, log_alpha_R, alpha_R, alpha_R, usable_R)


def _with_bucket(entries: Entries, log_tail_R: Tensor, has_tail_R: Tensor, log_outside_R1: Tensor) -> Entries:
    """One more entry, for everything outside the head."""
    # A tail that is too small for a float is still there: with no mass at all KL(q || p) would be infinite.
    least = float(torch.tensor(torch.finfo(log_tail_R.dtype).tiny).log())
    logp_R1 = torch.where(has_tail_R, torch.where(log_tail_R > LOG_NOTHING / 2, log_tail_R, least), 0.0)[:, None]
    return replace(
        entries, held_RX=torch.cat([entries.held_RX, has_tail_R[:, None]], 1),
        logp_RX=torch.cat([entries.logp_RX, logp_R1], 1), logq_RX=torch.cat([entries.logq_RX, log_outside_R1], 1),
        logw_RX=torch.cat([entries.logw_RX, torch.zeros_like(logp_R1)], 1))


def _require_fit(draft: DraftLogits, target: Target, how: Comparing, weights_R: Tensor) -> None:
    vocabulary = how.vocabulary
    if vocabulary is not None and vocabulary.vocab_size != target.vocab_size:
        raise UsageError(f"the draft vocabulary is a part of {vocabulary.vocab_size} tokens; the target has "
                         f"{target.vocab_size}")
    expected = (len(target), target.vocab_size if vocabulary is None else vocabulary.size)
    if tuple(draft.shape) != expected:
        raise UsageError(f"draft logits have shape {tuple(draft.shape)}; the target has {expected[0]} rows over a "
                         f"vocabulary of {expected[1]}{'' if vocabulary is None else ' (the draft vocabulary)'}")
    if tuple(weights_R.shape) != expected[:1]:
        raise UsageError(f"weights have shape {tuple(weights_R.shape)}; the target has {expected[0]} rows")
    if how.tail not in get_args(TailRule):
        raise UsageError(f"unknown tail rule {how.tail!r}; known are {', '.join(get_args(TailRule))}")
    if isinstance(target, ExactTarget) != (how.tail == "exact"):
        raise UsageError(f"tail={how.tail!r} does not fit a {type(target).__name__}: an ExactTarget is compared with "
                         "tail='exact', and nothing else is")
    if how.temperature <= 0:
        raise UsageError(f"temperature must be above 0, and is {how.temperature}")
    held_by = {"target": target.tail_mass_R if isinstance(target, SparseTarget) else target.states_RH,
               "weights": weights_R, "draft vocabulary": draft if vocabulary is None else vocabulary.t2d_V}
    for name, tensor in held_by.items():
        if tensor.device != draft.device:
            raise UsageError(f"the {name} is on {tensor.device} and the draft on {draft.device}: bring them together "
                             "with .to(device)")
    if isinstance(target, SparseTarget):
        _require_stored(target, how)


def _require_stored(target: SparseTarget, how: Comparing) -> None:
    if how.temperature > 1:
        raise UsageError(f"stored rows cannot be brought to a temperature of {how.temperature}: above 1 the tail "
                         "grows, and what is known of it bounds nothing; use an ExactTarget with tail='exact'")
    has_samples = target.tail_ids_RM.shape[1] > 0 or target.topk_ids_RK.shape[1] >= target.vocab_size
    if how.tail == "sampled" and not has_samples:
        raise UsageError("this target holds no tail samples: ask for tail='drop' or tail='bucket'")
    if how.temperature != 1 and not has_samples:
        raise UsageError(f"this target holds no tail samples, and without them it cannot be brought to a temperature "
                         f"of {how.temperature}")
