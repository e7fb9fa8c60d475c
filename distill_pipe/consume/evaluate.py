"""What a draft is worth, from held-out shards alone: acceptance per position, and the expected acceptance length tau.

No target is run: an engine's steps are followed along the text that was written. Given that text x, a drafted token is
the one that was written, and accepted, with probability w_i = min(1, q(x_i) / p(x_i)); so from an anchor the first k
tokens are accepted with w_1 ... w_k, and the next step starts behind them. That says how often each place of the text
is an anchor, v_t, and with K drafted tokens per step

    tau_K = 1 + sum_t v_t sum_{k=1..K} (prod_{i<k} w_i) alpha_k / sum_t v_t

alpha_k is the expectation of w_k over the token that comes, which is less noisy than w_k. For text that was sampled
from the target at the temperature of the verification this is what a lossless engine does, and unbiased but for the
ratio. So it is at T = 1, where the run's sampling settings say so. At T = 0, w_i and alpha_i are 1 where draft and
target have the same favourite: exact for greedy text. Otherwise w_i = alpha_i, as if acceptance did not depend on the
token. `assumptions` in the result says which. Chains that would leave the trace are not counted.

Standard errors come from a bootstrap over traces, because the rows of one trace are not independent. The bounds of
alpha are the certified ones of the stored rows.

Shapes: T tokens, K draft steps, N traces, S resamples.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_pipe.consume.acceptance import RowAcceptance, row_acceptance
from distill_pipe.consume.comparison import TailRule
from distill_pipe.consume.drafts.checkpoint import load_draft, read_record
from distill_pipe.consume.drafts.draft import Draft
from distill_pipe.consume.reader import Batch, ShardReader, Split
from distill_pipe.errors import UsageError
from distill_pipe.store.labels import domains
from distill_pipe.store.manifest import Run, require_run
from distill_pipe.store.root import open_root

LENGTHS = tuple(range(1, 9))
RESAMPLES = 1000
SAMPLED_TEXT = "the text is a sample of the target at T = 1, so tau at T = 1 is unbiased"
CHAINED = "the text is no sample of the target at T = 1: acceptance is taken not to depend on what was accepted"
GREEDY = "the stored text is followed as if the target had written it greedily"


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A mean, and its standard error over traces."""

    mean: float
    error: float


class PositionAcceptance(msgspec.Struct, frozen=True, kw_only=True):
    """Acceptance rate of the token drafted at `position`, which counts from 1, over `rows` rows, with its certified
    bounds."""

    position: int
    rows: int
    alpha: Estimate
    lower: float
    upper: float


class AcceptanceLength(msgspec.Struct, frozen=True, kw_only=True):
    """Expected tokens per step of the target when `drafted` tokens are drafted, the target's own token included.
    `anchors` is how many steps were followed, in expectation."""

    drafted: int
    anchors: float
    tau: Estimate


class DomainEvaluation(msgspec.Struct, frozen=True, kw_only=True):
    """One domain, or everything (`domain` is None), at one temperature."""

    domain: str | None
    temperature: float
    traces: int
    positions: tuple[PositionAcceptance, ...]
    lengths: tuple[AcceptanceLength, ...]


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. `assumptions` say what tau rests on, by temperature."""

    arch: str
    holdout_every: int
    assumptions: dict[float, str]
    domains: tuple[DomainEvaluation, ...]


def evaluate(root: str | Path, draft_folder: Path, target_folder: Path, *, temperatures: Sequence[float] = (0.0, 1.0),
             tail: TailRule | None = None) -> Evaluation:
    """Evaluate a saved draft on the traces of a dataset that it was not trained on.

    Args:
        root: the dataset.
        draft_folder: what `train` wrote.
        target_folder: the target's checkpoint; only its embedding, head and final norm are read.
        temperatures: of the verification; 0, or above 0 and at most 1.
        tail: what stands in for the mass outside the head; `sampled` by default, or `bucket` where nothing was sampled.

    Raises:
        UsageError: the draft does not belong to the dataset, a temperature is out of range, or nothing is held out.
    """
    run, record = require_run(open_root(root)), read_record(draft_folder)
    draft = load_draft(draft_folder, target_folder)
    sizes = (draft.config.hidden_size, draft.config.vocab_size)
    if sizes != (run.spec.target.hidden_size, run.spec.target.vocab_size):
        raise UsageError(f"{draft_folder} is a draft for a target with hidden size {sizes[0]} and vocabulary {sizes[1]}"
                         f"; the dataset's has {run.spec.target.hidden_size} and {run.spec.target.vocab_size}")
    return evaluate_draft(root, draft, record.holdout_every, temperatures=temperatures, tail=tail)


def evaluate_draft(root: str | Path, draft: Draft, holdout_every: int, *, temperatures: Sequence[float] = (0.0, 1.0),
                   tail: TailRule | None = None, split: Split = "heldout", batch_tokens: int = 2048) -> Evaluation:
    """The same for a draft at hand, on every `holdout_every`-th trace, or with `split="all"` on a dataset that it was
    not trained on."""
    store = open_root(root)
    run, labels = require_run(store), domains(store)
    reader = ShardReader(store, layers=draft.layers, batch_tokens=batch_tokens, split=split,
                         holdout_every=holdout_every)
    rule: TailRule = tail or ("sampled" if run.spec.capture.tail_samples else "bucket")
    sums = _sums(draft, reader, labels, rule, temperatures)
    return Evaluation(arch=draft.arch, holdout_every=holdout_every,
                      assumptions={t: _assumption(run, t) for t in temperatures},
                      domains=tuple(domain for t in temperatures for domain in _by_domain(t, sums[t])))


@dataclass(frozen=True, slots=True, eq=False)
class _TraceSums:
    """Sums over one trace: alpha with bounds and rows by position, and by length tau and anchors, weighted by how often
    each place is one."""

    domain: str | None
    alpha_K4: NDArray[np.float64]
    tau_K2: NDArray[np.float64]


def _sums(draft: Draft, reader: ShardReader, labels: dict[int, str | None], tail: TailRule,
          temperatures: Sequence[float]) -> dict[float, list[_TraceSums]]:
    """What every trace adds up to, by temperature. T = 0 needs no pass of its own beside T = 1."""
    for temperature in temperatures:
        if not 0 <= temperature <= 1:
            raise UsageError(f"temperature {temperature} cannot be evaluated from stored rows: give 0, or up to 1")
    steps = LENGTHS[-1] if draft.recurrent else draft.positions
    sums: dict[float, list[_TraceSums]] = {temperature: [] for temperature in temperatures}
    for batch in (b.to(draft.device) for b in reader):
        at = {t: row_acceptance(draft, batch, steps, tail, t) for t in {t or 1.0 for t in temperatures}}
        for temperature in temperatures:
            found = at[temperature] if temperature else _greedy(at[1.0])
            passed_KT = found.passed_KT if _is_sample(reader.run, temperature) else found.alpha_KT
            sums[temperature] += _trace_sums(batch, labels, found, passed_KT)
    if not all(sums.values()):
        raise UsageError("no trace is held out: the draft has seen all of this dataset")
    return sums


def _by_domain(temperature: float, sums: Sequence[_TraceSums]) -> list[DomainEvaluation]:
    """Everything together, then each domain."""
    by_domain: dict[str, list[_TraceSums]] = defaultdict(list)
    for one in sums:
        if one.domain is not None:
            by_domain[one.domain].append(one)
    return [_summary(None, temperature, sums),
            *(_summary(name, temperature, of) for name, of in sorted(by_domain.items()))]


def _greedy(found: RowAcceptance) -> RowAcceptance:
    """At T = 0 a token is accepted where both have the same favourite, and there is nothing to bound."""
    match_KT = found.match_KT
    return replace(found, alpha_KT=match_KT, lower_KT=match_KT, upper_KT=match_KT)


def _is_sample(run: Run, temperature: float) -> bool:
    sampling = run.spec.sampling
    return sampling is not None and temperature == sampling.temperature == sampling.top_p == 1


def _assumption(run: Run, temperature: float) -> str:
    if temperature == 0:
        return GREEDY
    return SAMPLED_TEXT if _is_sample(run, temperature) else CHAINED


def _trace_sums(batch: Batch, labels: dict[int, str | None], found: RowAcceptance,
                passed_KT: Tensor) -> list[_TraceSums]:
    """`passed_KT` is what a token contributes to the chains that go on behind it."""
    through_KT = torch.cat([torch.ones_like(passed_KT[:1]), passed_KT[:-1].cumprod(0)]) * found.alpha_KT
    # A place can be an anchor where the target has just sampled a supervised token.
    anchor_T = torch.zeros(len(batch.token_ids_T), device=passed_KT.device)
    anchor_T[batch.rows_R] = 1.0
    values = torch.stack([found.alpha_KT, found.lower_KT, found.upper_KT, found.drafted_KT, 1 + through_KT.cumsum(0),
                          found.drafted_KT.cumprod(0) * anchor_T, passed_KT]).double().cpu().numpy()
    sums = []
    for (start, stop), ordinal in zip(pairwise(batch.cu_seqlens_B1.tolist()), batch.ordinals_B.tolist(), strict=True):
        *alphas, tau_KT, chains_KT, passed = values[..., start:stop]
        visits_KT = _visits(passed, anchor_T[start:stop].cpu().numpy() > 0) * chains_KT
        sums.append(_TraceSums(labels.get(ordinal), np.stack([part_KT.sum(1) for part_KT in alphas], 1),
                               np.stack([(tau_KT * visits_KT).sum(1), visits_KT.sum(1)], 1)))
    return sums


def _visits(passed_KT: NDArray[np.float64], anchor_T: NDArray[np.bool_]) -> NDArray[np.float64]:
    """How often each place of one trace is an anchor, by the number of drafted tokens: row K - 1 for K of them."""
    steps, tokens = passed_KT.shape
    accepted_KT = passed_KT.clip(0, 1).cumprod(0)
    visits_KT = np.zeros((steps, tokens + steps + 1))
    # The first token behind a prompt always comes from the target alone.
    visits_KT[:, :tokens][:, anchor_T & ~np.append(False, anchor_T[:-1])] = 1.0
    for k in range(steps):
        # P(exactly j accepted) for j = 0 .. K.
        falls_KT = -np.diff(accepted_KT[:k + 1], axis=0, prepend=1.0, append=0.0)
        for t in np.flatnonzero(anchor_T):
            visits_KT[k, t + 1:t + 3 + k] += visits_KT[k, t] * falls_KT[:, t]
    return visits_KT[:, :tokens]


def _summary(domain: str | None, temperature: float, sums: Sequence[_TraceSums]) -> DomainEvaluation:
    alpha_NK4 = np.stack([s.alpha_K4 for s in sums])
    tau_NK2 = np.stack([s.tau_K2 for s in sums])
    shares_SN = _resamples(len(sums))
    rows_K = alpha_NK4[..., 3].sum(0)
    bounds_K2 = alpha_NK4[..., 1:3].sum(0) / np.maximum(rows_K, 1)[:, None]
    positions = tuple(
        PositionAcceptance(position=k + 1, rows=int(rows_K[k]), lower=float(bounds_K2[k, 0]),
                           upper=float(bounds_K2[k, 1]),
                           alpha=_ratio(alpha_NK4[:, k, 0], alpha_NK4[:, k, 3], shares_SN))
        for k in range(len(rows_K)))
    lengths = tuple(AcceptanceLength(drafted=k + 1, anchors=float(tau_NK2[:, k, 1].sum()),
                                     tau=_ratio(tau_NK2[:, k, 0], tau_NK2[:, k, 1], shares_SN))
                    for k in range(len(rows_K)))
    return DomainEvaluation(domain=domain, temperature=temperature, traces=len(sums), positions=positions,
                            lengths=lengths)


def _resamples(traces: int) -> NDArray[np.int64]:
    """How often each trace is drawn in each of the bootstrap's resamples."""
    counts: NDArray[np.int64] = np.random.default_rng(0).multinomial(traces, np.full(traces, 1 / traces), RESAMPLES)
    return counts


def _ratio(sums_N: NDArray[np.float64], counts_N: NDArray[np.float64], shares_SN: NDArray[np.int64]) -> Estimate:
    """Sum over counts, with the bootstrap's standard error."""
    counts_S = shares_SN @ counts_N
    drawn_S = (shares_SN @ sums_N)[counts_S > 0] / counts_S[counts_S > 0]
    error = float(drawn_S.std()) if len(drawn_S) else 0.0
    return Estimate(mean=float(sums_N.sum() / max(counts_N.sum(), 1)), error=error)
