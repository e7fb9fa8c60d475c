"""Logits to what is stored of them: exact head, logsumexp, tail mass, samples of the tail, and the next token's share.

Runs where the logits are (torch, any device). On a CPU a few rows at a time go through all passes while they are in the
core's cache, and exponentials are powers of two, which torch computes three times as fast; on a GPU, and where the
vocabulary is split over devices, a whole chunk goes at once. Devices that share a vocabulary exchange K entries, masses
and samples per row, never logits.

The tail is sampled systematically: one uniform number u per row gives the M points (u + m) / M on the cumulative tail
distribution. Each sample then falls on token x with probability p_tail(x), so `tail_mass * mean f(x)` is unbiased for
`sum_{x in tail} p(x) f(x)`, and its variance is below that of independent draws for smooth f. u is a hash of (run seed,
prompt ordinal, position), so a rerun draws the same samples, in any batch and over any number of devices.

Shapes: R rows, K head entries, M tail samples, V vocabulary (of this device), S devices, G blocks of BLOCK tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from distill_pipe.store.spec import CaptureSpec
from distill_pipe.store.splitmix import mix

BLOCK = 128
# On a CPU, four rows of 50,000 logits and their exponentials stay in a core's own cache, 32 in the one it shares.
_CACHE_ROWS, _BLOCK_ROWS = 4, 32
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Which tokens the logits of this device are of: those from id `first` on, part `rank` of S. `gather` takes
    `[R, n]` float32 and returns every part's, `[S, R, n]`; None where all of the vocabulary is here."""

    first: int = 0
    rank: int = 0
    gather: Callable[[Tensor], Tensor] | None = None

    def all(self, *columns: Tensor) -> list[Tensor]:
        """Each `[R, n]` tensor of every part, `[S, R, n]`, in one exchange."""
        if self.gather is None:
            return [column[None] for column in columns]
        widths = [column.shape[1] for column in columns]
        return list(torch.split(self.gather(torch.cat([c.float() for c in columns], 1)), widths, -1))


WHOLE = VocabShard()


@dataclass(frozen=True, slots=True)
class HeadRows:
    """The stored part of R rows. Log-probabilities are of the raw logits. Head entries that a row does not need have
    id -1, and so has the whole tail of a row without tail mass. `next_logprob_R` is NaN where no token was named."""

    topk_ids_RK: Tensor
    topk_logprobs_RK: Tensor
    logsumexp_R: Tensor
    tail_mass_R: Tensor
    tail_ids_RM: Tensor
    tail_logprobs_RM: Tensor
    next_logprob_R: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.topk_ids_RK, self.topk_logprobs_RK, self.logsumexp_R, self.tail_mass_R, self.tail_ids_RM,
                self.tail_logprobs_RM, self.next_logprob_R)


class HeadReducer:
    """Reduces rows of logits to what `capture` keeps of them. Holds scratch memory: one for each engine."""

    def __init__(self, capture: CaptureSpec, shard: VocabShard = WHOLE) -> None:
        self._capture, self._shard = capture, shard
        self._weights_BV = torch.empty(0, 0)

    def rows(self, logits_RV: Tensor, uniform_R: Tensor, next_R: Tensor) -> HeadRows:
        """The head is the `top_k` likeliest tokens, or with `coverage` the fewest of them whose mass reaches it.

        `uniform_R` is in [0, 1), one number per row; `next_R` is the token after each row, negative where it is not
        known. The tail mass is summed over the tail itself, block sums in float64, so it keeps its relative precision
        where 1 - sum(head) would have none left. The logits are left as they are.
        """
        rows = len(logits_RV)
        size = _BLOCK_ROWS if logits_RV.device.type == "cpu" and self._shard.gather is None else max(rows, 1)
        parts = []
        for first in range(0, rows, size):
            block = slice(first, first + size)
            parts.append(self._reduce(logits_RV[block].float(), uniform_R[block], next_R[block]))
        return HeadRows(*map(torch.cat, zip(*(p.tensors() for p in parts), strict=True)))

    def _reduce(self, logits_RV: Tensor, uniform_R: Tensor, next_R: Tensor) -> HeadRows:
        vocab = logits_RV.shape[1]
        weights_RV = self._scratch(logits_RV)
        groups = _groups(vocab, min(self._capture.top_k, vocab))
        largest_R1, own_lse_R1, best_RG = _weigh(logits_RV, weights_RV[:, :vocab], groups)
        ids_RK, top_RK, lse_R1 = self._head(logits_RV, best_RG, own_lse_R1)
        # What is not a head entry of this device clears the spare column.
        weights_RV.scatter_(1, _local(ids_RK, self._shard, vocab), 0.0)
        sums_RG = weights_RV.view(len(weights_RV), -1, BLOCK).sum(-1).double()
        mass_R1 = (sums_RG.sum(1, keepdim=True) * (largest_R1.double() - lse_R1).exp()).float()
        next_R1 = _logits(logits_RV, _local(next_R[:, None], self._shard, vocab))
        mass_SR1, next_SR1 = self._shard.all(mass_R1, next_R1)
        next_logprob_R = torch.where(next_R >= 0, (next_SR1.amax(0) - lse_R1)[:, 0], torch.nan)
        points_RM = _own_points(mass_SR1.double(), uniform_R, self._capture.tail_samples, self._shard.rank)
        tail_ids_RM, tail_RM = self._tail(logits_RV, _sample_tail(weights_RV, sums_RG, points_RM))
        return HeadRows(ids_RK.int(), top_RK, lse_R1[:, 0], mass_SR1.sum(0)[:, 0].clamp(max=1.0), tail_ids_RM,
                        torch.where(tail_ids_RM >= 0, tail_RM - lse_R1, 0.0), next_logprob_R)

    def _head(self, logits_RV: Tensor, best_RG: Tensor, own_lse_R1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and log-probabilities of the head, and logsumexp, of the whole vocabulary."""
        top_k = self._capture.top_k
        values_RK, ids_RK = _largest(logits_RV, best_RG, min(top_k, logits_RV.shape[1]))
        if values_RK.shape[1] < top_k:
            # A part of the vocabulary that is smaller than the head offers all it has.
            missing = (0, top_k - values_RK.shape[1])
            values_RK, ids_RK = pad(values_RK, missing, value=-torch.inf), pad(ids_RK, missing)
        values_SRK, ids_SRK, lse_SR1 = self._shard.all(values_RK, ids_RK + self._shard.first, own_lse_R1)
        lse_R1 = lse_SR1.logsumexp(0) if len(lse_SR1) > 1 else own_lse_R1
        top_RK, ids_RK = _merge(values_SRK, ids_SRK.long(), top_k)
        top_RK = top_RK - lse_R1
        if self._capture.coverage is not None:
            ids_RK = torch.where(_needed(top_RK, self._capture.coverage), ids_RK, -1)
        return ids_RK, top_RK, lse_R1

    def _tail(self, logits_RV: Tensor, columns_RM: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and logits of the samples, each from the device that drew it."""
        here_RM = columns_RM >= 0
        logits_RM = _logits(logits_RV, torch.where(here_RM, columns_RM, logits_RV.shape[1]))
        ids_SRM, logits_SRM = self._shard.all(torch.where(here_RM, columns_RM + self._shard.first, -1), logits_RM)
        return ids_SRM.amax(0).int(), logits_SRM.amax(0)

    def _scratch(self, logits_RV: Tensor) -> Tensor:
        """`[R, V]` of scratch in whole blocks, with at least one spare column; the columns past V are zero."""
        rows, vocab = logits_RV.shape
        columns = -(-(vocab + 1) // BLOCK) * BLOCK
        if self._weights_BV.device != logits_RV.device or self._weights_BV.shape[1] != columns or (
                len(self._weights_BV) < rows):
            self._weights_BV = torch.zeros(rows, columns, device=logits_RV.device)
        self._weights_BV[:rows, vocab:] = 0.0
        return self._weights_BV[:rows]


def row_uniforms(seed: int, ordinal: int | NDArray[np.int64], positions_R: NDArray[np.int64]) -> NDArray[np.float32]:
    """One number in [0, 1) per row: a splitmix64 hash of (seed, ordinal, position), the upper 24 bits."""
    with np.errstate(over="ignore"):
        state = mix(np.array([seed % 2**64], np.uint64))
        state = mix(state ^ np.asarray(ordinal).astype(np.uint64))
        bits_R = mix(state ^ positions_R.astype(np.uint64))
    return (bits_R >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _groups(vocab: int, top_k: int) -> int:
    """Into how many groups to sort the tokens to find the head: torch selects 64 times faster where there are at least
    64 for each wanted one. One for each token where the vocabulary does not divide."""
    fits = [size for size in (16, 8, 4) if vocab % size == 0 and vocab // size >= 64 * top_k]
    return vocab // fits[0] if fits else vocab


def _weigh(logits_RV: Tensor, weights_RV: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's probability, in units of the row's likeliest one, into `weights_RV`. Returns the largest logit and
    logsumexp, `[R, 1]`, and the largest of each group, group g being every G-th token from g on: neighbours in memory
    then go to different groups, which is how maxima are fast."""
    rows = len(logits_RV)
    largest_R1, lse_R1, best_RG = (logits_RV.new_empty(rows, columns) for columns in (1, 1, groups))
    step = _CACHE_ROWS if logits_RV.device.type == "cpu" else rows
    for first in range(0, rows, step):
        block = slice(first, first + step)
        logits, weights = logits_RV[block], weights_RV[block]
        torch.amax(logits.view(len(logits), -1, groups), 1, out=best_RG[block])
        largest = torch.amax(best_RG[block], 1, keepdim=True, out=largest_R1[block])
        torch.sub(logits, largest, out=weights).mul_(_LOG2_E).exp2_()
        lse_R1[block] = largest + weights.sum(1, keepdim=True).log_()
    return largest_R1, lse_R1, best_RG


def _largest(logits_RV: Tensor, best_RG: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Values and columns of the `top_k` largest of each row: the groups with the largest maxima hold them all."""
    rows, vocab = logits_RV.shape
    groups = best_RG.shape[1]
    if groups == vocab:
        return logits_RV.topk(top_k, dim=-1)
    best_RK = best_RG.topk(top_k, dim=-1, sorted=False).indices
    steps = torch.arange(0, vocab, groups, device=logits_RV.device)
    places_RN = (best_RK[:, None] + steps[:, None]).view(rows, -1)
    values_RK, which_RK = logits_RV.gather(1, places_RN).topk(top_k, dim=-1)
    return values_RK, places_RN.gather(1, which_RK)


def _merge(values_SRK: Tensor, ids_SRK: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The head of the whole vocabulary out of the heads of its parts."""
    if len(values_SRK) == 1:
        return values_SRK[0], ids_SRK[0]
    values_RN, ids_RN = values_SRK.movedim(0, 1).flatten(1), ids_SRK.movedim(0, 1).flatten(1)
    values_RK, places_RK = values_RN.topk(top_k, dim=-1)
    return values_RK, ids_RN.gather(1, places_RK)


def _needed(top_RK: Tensor, coverage: float) -> Tensor:
    """The entries before which the head does not cover enough yet; the first is always one of them."""
    probs_RK = top_RK.double().exp()
    return probs_RK.cumsum(1) - probs_RK < coverage


def _local(ids: Tensor, shard: VocabShard, vocab: int) -> Tensor:
    """Columns of token ids, `vocab` for those that are not here."""
    columns = ids - shard.first
    return torch.where((ids >= 0) & (columns >= 0) & (columns < vocab), columns, vocab)


def _logits(logits_RV: Tensor, columns_RN: Tensor) -> Tensor:
    """The logits of columns, -inf where the column is past the last."""
    vocab = logits_RV.shape[1]
    return torch.where(columns_RN < vocab, logits_RV.gather(1, columns_RN.clamp(max=vocab - 1)), -torch.inf)


def _own_points(mass_SR1: Tensor, uniform_R: Tensor, samples: int, rank: int) -> Tensor:
    """The sampling points that fall on this device's part of the tail, as shares of that part; NaN elsewhere."""
    ends_SR1 = mass_SR1.cumsum(0)
    steps_M = torch.arange(samples, device=uniform_R.device, dtype=torch.float64)
    points_RM = (uniform_R.double()[:, None] + steps_M) / samples * ends_SR1[-1]
    start_R1 = ends_SR1[rank - 1] if rank else torch.zeros_like(ends_SR1[0])
    inside_RM = (points_RM >= start_R1) & (points_RM < ends_SR1[rank])
    return torch.where(inside_RM, (points_RM - start_R1) / mass_SR1[rank], torch.nan)


def _sample_tail(weights_RV: Tensor, sums_RG: Tensor, points_RM: Tensor) -> Tensor:
    """The column at each point of the cumulative weights, -1 where the point is NaN. Two levels, blocks then tokens, so
    that no cumulative sum over V is ever made."""
    blocks_RGB = weights_RV.view(len(weights_RV), -1, BLOCK)
    cumulative_RG = sums_RG.cumsum(-1)
    weight_RM = points_RM.nan_to_num(0.0) * cumulative_RG[:, -1:]
    block_RM = _place(cumulative_RG, weight_RM)
    before_RM = cumulative_RG.gather(1, block_RM) - sums_RG.gather(1, block_RM)
    inner_RMB = blocks_RGB.gather(1, block_RM[:, :, None].expand(-1, -1, BLOCK)).cumsum(-1, dtype=torch.float64)
    offset_RM = _place(inner_RMB, (weight_RM - before_RM)[:, :, None])[:, :, 0]
    return torch.where(points_RM.isnan(), -1, block_RM * BLOCK + offset_RM)


def _place(cumulative: Tensor, point: Tensor) -> Tensor:
    """The first index along the last dimension whose cumulative weight is above `point`; such an index has a weight of
    its own. A point that rounding pushed past the end counts as just before it."""
    end = torch.nextafter(cumulative[..., -1:], cumulative.new_zeros(()))
    return torch.searchsorted(cumulative, torch.minimum(point, end), right=True).clamp_(max=cumulative.shape[-1] - 1)
