"""Logits to what is stored of them: exact head, logsumexp, tail mass, and samples of the tail.

Runs where the logits are (torch, any device), on at most a few hundred rows at a time, because one float32 copy of
`[rows, V]` is the largest thing capture ever holds.

The tail is sampled systematically: one uniform number u per row gives the M points (u + m) / M on the cumulative tail
distribution. Each sample then falls on token x with probability p_tail(x), so `tail_mass * mean f(x)` is unbiased for
`sum_{x in tail} p(x) f(x)`, and its variance is below that of independent draws for smooth f. u is a hash of (run seed,
prompt ordinal, position), so a rerun draws the same samples, in any batch.

Shapes: R rows, K head entries, M tail samples, V vocabulary, G blocks of BLOCK tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_pipe.store.spec import CaptureSpec
from distill_pipe.store.splitmix import mix

BLOCK = 256
CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True)
class HeadRows:
    """The stored part of R rows. Log-probabilities are of the raw logits. Head entries that a row does not need have
    id -1, and so has the whole tail of a row without tail mass."""

    topk_ids_RK: Tensor
    topk_logprobs_RK: Tensor
    logsumexp_R: Tensor
    tail_mass_R: Tensor
    tail_ids_RM: Tensor
    tail_logprobs_RM: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.topk_ids_RK, self.topk_logprobs_RK, self.logsumexp_R, self.tail_mass_R, self.tail_ids_RM,
                self.tail_logprobs_RM)


def head_rows(logits_RV: Tensor, capture: CaptureSpec, uniform_R: Tensor) -> HeadRows:
    """Reduce rows of logits to head, tail mass and tail samples.

    The head is the `top_k` likeliest tokens, or with `coverage` the fewest of them whose mass reaches it. `uniform_R`
    is in [0, 1), one number per row. The tail mass is summed over the tail itself, in float64 over block sums, so it
    keeps its relative precision where 1 - sum(head) would have none left.
    """
    logits_RV = logits_RV.float()
    top_RK, ids_RK = logits_RV.topk(capture.top_k, dim=-1)
    logsumexp_R = logits_RV.logsumexp(-1)
    top_RK = top_RK - logsumexp_R[:, None]
    probs_RV = (logits_RV - logsumexp_R[:, None]).exp_()
    if capture.coverage is None:
        probs_RV.scatter_(1, ids_RK, 0.0)
    else:
        needed_RK = _needed(top_RK, capture.coverage)
        probs_RV.scatter_(1, ids_RK, torch.where(needed_RK, 0.0, top_RK.exp()))
        ids_RK = torch.where(needed_RK, ids_RK, -1)
    mass_R, tail_ids_RM = _sample_tail(probs_RV, capture.tail_samples, uniform_R)
    tail_logprobs_RM = logits_RV.gather(1, tail_ids_RM.clamp(min=0)) - logsumexp_R[:, None]
    return HeadRows(ids_RK.int(), top_RK, logsumexp_R, mass_R.float().clamp(max=1.0), tail_ids_RM.int(),
                    tail_logprobs_RM)


def row_uniforms(seed: int, ordinal: int, positions_R: NDArray[np.int64]) -> NDArray[np.float32]:
    """One number in [0, 1) per row: a splitmix64 hash of (seed, ordinal, position), the upper 24 bits."""
    with np.errstate(over="ignore"):
        state = mix(np.array([seed % 2**64], np.uint64))
        state = mix(state ^ np.uint64(ordinal))
        bits_R = mix(state ^ positions_R.astype(np.uint64))
    return (bits_R >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _needed(top_RK: Tensor, coverage: float) -> Tensor:
    """The entries before which the head does not cover enough yet; the first is always one of them."""
    probs_RK = top_RK.double().exp()
    return probs_RK.cumsum(1) - probs_RK < coverage


def _sample_tail(probs_RV: Tensor, samples: int, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """Total tail mass (float64), and `samples` ids per row, -1 where there is no mass. Two levels, blocks then tokens,
    so that no cumulative sum over V is ever made."""
    rows, vocab = probs_RV.shape
    blocks_RGB = torch.nn.functional.pad(probs_RV, (0, -vocab % BLOCK)).view(rows, -1, BLOCK)
    cumulative_RG = blocks_RGB.sum(-1, dtype=torch.float64).cumsum(-1)
    mass_R = cumulative_RG[:, -1]
    if samples == 0:
        return mass_R, torch.empty(rows, 0, dtype=torch.int64, device=probs_RV.device)
    steps_M = torch.arange(samples, device=probs_RV.device, dtype=torch.float64)
    point_RM = (uniform_R.double()[:, None] + steps_M) / samples * mass_R[:, None]
    block_RM = torch.searchsorted(cumulative_RG, point_RM, right=True).clamp_(max=cumulative_RG.shape[1] - 1)
    before_RM = torch.where(block_RM > 0, cumulative_RG.gather(1, (block_RM - 1).clamp(min=0)), 0.0)
    inner_RMB = blocks_RGB.gather(1, block_RM[:, :, None].expand(-1, -1, BLOCK)).double()
    offset_RM = (inner_RMB.cumsum(-1) <= (point_RM - before_RM)[:, :, None]).sum(-1).clamp_(max=BLOCK - 1)
    # Rounding can push a point past its block's last token; the block's likeliest token stands in.
    empty_RM = inner_RMB.gather(2, offset_RM[:, :, None]).squeeze(2) == 0
    offset_RM = torch.where(empty_RM, inner_RMB.argmax(-1), offset_RM)
    ids_RM = block_RM * BLOCK + offset_RM
    return mass_R, torch.where(mass_R[:, None] > 0, ids_RM, -1)
