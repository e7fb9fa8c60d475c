"""What a stored row says of the target's distribution: its entries with their weights, at a temperature of 1 or below.

At temperature T a token has p^(1/T) / Z, with Z = sum_v p_v^(1/T) over the whole vocabulary. The head's part of Z is
known. The tail's is estimated from the tail samples: each stands for `w p^(1/T)` with its weight `w = P / (M p)`, which
is unbiased for Z, and nearly so for what is divided by it, since a tail matters less the lower the temperature.

What bounds rest on needs no samples. What rounding to b significant bits has turned into x was within half a unit of
the last bit kept (schemas/FORMAT.md section 5.1; b = 24 is exact):

    head entry   |log p - x| <= 2^(floor(log2 |x|) - b) <= 2^-b |x|,  x as it was stored, before readers shift it
    tail mass    |P - x| <= 2^-b' x,                                  b' = min(24, b + 8)

Head and tail add up to 1, so an entry is also what all others leave over. The N tail entries add up to P, and none is
above the smallest head entry c, so

    P^(1/T) N^(1 - 1/T)  <=  sum over the tail of p^(1/T)  <=  P min(c, P)^(1/T - 1)

An entry at T is largest where it is largest at 1 and all else smallest, and the other way round. Above 1 a sample's
part of Z has no bound, so T > 1 is refused. Everything is in logs, and LOG_NOTHING where there is nothing.

Shapes: R rows, K head entries, M tail samples, X head entries and then samples.
"""

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from distill_pipe.consume.lookup import LOG_NOTHING
from distill_pipe.consume.sparse import SparseTarget
from distill_pipe.store.codec import FLOAT32_BITS, rounding_error, scalar_bits

# What a sum over a row of float32 numbers is good to, as a share of the whole.
_SUM_ERROR: Final = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Tempered:
    """Logs, at a temperature: of Z and of the tail's mass as estimated; of the least and the most that each head entry
    and the tail's mass can be; and of the most that one tail entry can be."""

    z_R: Tensor
    tail_mass_R: Tensor
    lower_RK: Tensor
    upper_RK: Tensor
    tail_lower_R: Tensor
    tail_upper_R: Tensor
    cap_R: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class StoredRows:
    """The entries of R rows at temperature 1: `num_head` columns of the head, then the samples.

    `logw_RX` is the log of the weight: 0 in the head, of `P / (M p)` for a sample. `tail_tokens_R` is the N above;
    `exact_RK` the head as it was stored, and `logprob_bits` the b of it.
    """

    ids_RX: Tensor
    held_RX: Tensor
    logp_RX: Tensor
    logw_RX: Tensor
    tail_mass_R: Tensor
    tail_tokens_R: Tensor
    exact_RK: Tensor
    logprob_bits: int

    @classmethod
    def of(cls, target: SparseTarget, weights_R: Tensor, dtype: torch.dtype) -> "StoredRows":
        """The rows of a target. One without weight may hold anything, so it is taken as holding nothing."""
        num_head = target.topk_ids_RK.shape[1]
        ids_RX = torch.cat([target.topk_ids_RK, target.tail_ids_RM], 1)
        logp_RX = torch.cat([target.topk_logprobs_RK, target.tail_logprobs_RM], 1).to(dtype)
        held_RX = (ids_RX >= 0) & (logp_RX > LOG_NOTHING) & (weights_R[:, None] > 0)
        tail_tokens_R = torch.where(weights_R > 0, target.vocab_size - held_RX[:, :num_head].sum(1), 0)
        # A head that holds the whole vocabulary leaves no tail, whatever rounding put into the stored mass.
        tail_R = torch.where(tail_tokens_R > 0, target.tail_mass_R.to(dtype), 0.0)
        held_RX[:, num_head:] &= tail_R[:, None] > 0
        logp_RX = torch.where(held_RX, logp_RX, LOG_NOTHING)
        log_tail_R = torch.where(tail_R > 0, tail_R.log(), LOG_NOTHING)
        log_count_R = held_RX[:, num_head:].sum(1).clamp(min=1).to(dtype).log()
        logw_RM = torch.where(held_RX[:, num_head:], (log_tail_R - log_count_R)[:, None] - logp_RX[:, num_head:],
                              LOG_NOTHING)
        logw_RX = torch.cat([torch.zeros_like(logp_RX[:, :num_head]), logw_RM], 1)
        shift_R = target.topk_shift_R
        exact_RK = logp_RX[:, :num_head] if shift_R is None else logp_RX[:, :num_head] - shift_R.to(dtype)[:, None]
        return cls(ids_RX, held_RX, logp_RX, logw_RX, log_tail_R, tail_tokens_R, exact_RK, target.logprob_bits)

    @property
    def num_head(self) -> int:
        """K."""
        return self.exact_RK.shape[1]

    def at(self, temperature: float) -> Tempered:
        """What the temperature makes of each row. At 1, Z is 1, whatever the entries add up to after rounding."""
        held_RK, power = self.held_RX[:, :self.num_head], 1 / temperature
        tail_lower_R, tail_upper_R = self._tail_bounds()
        lower_RK, upper_RK = self._head_bounds(tail_lower_R, tail_upper_R)
        smallest_R = torch.cat([torch.where(held_RK, upper_RK, 0.0), tail_upper_R[:, None]], 1).amin(1)
        if temperature == 1:
            return Tempered(torch.zeros_like(smallest_R), self.tail_mass_R, lower_RK, upper_RK, tail_lower_R,
                            tail_upper_R, smallest_R)
        parts_RX = power * self.logp_RX + self.logw_RX
        head_R, sampled_R = (_logsumexp(part) for part in (parts_RX[:, :self.num_head], parts_RX[:, self.num_head:]))
        z_R = torch.logaddexp(head_R, sampled_R)
        lower_RK, upper_RK = power * lower_RK, power * upper_RK
        head_lower_R, head_upper_R = _logsumexp(lower_RK), _logsumexp(upper_RK)
        tail_lower_R = power * tail_lower_R + (1 - power) * self.tail_tokens_R.clamp(min=1).log()
        tail_upper_R = tail_upper_R + (power - 1) * smallest_R
        z_lower_R = torch.logaddexp(head_lower_R, tail_lower_R)
        z_upper_R = torch.logaddexp(head_upper_R, tail_upper_R)
        return Tempered(
            z_R, sampled_R - z_R,
            torch.where(held_RK, lower_RK - torch.logaddexp(_others(z_upper_R, upper_RK), lower_RK), LOG_NOTHING),
            torch.where(held_RK, upper_RK - torch.logaddexp(_others(z_lower_R, lower_RK), upper_RK), LOG_NOTHING),
            tail_lower_R - torch.logaddexp(head_upper_R, tail_lower_R),
            tail_upper_R - torch.logaddexp(head_lower_R, tail_upper_R), power * smallest_R - z_lower_R)

    def _tail_bounds(self) -> tuple[Tensor, Tensor]:
        error = rounding_error(scalar_bits(self.logprob_bits))
        return self.tail_mass_R + math.log1p(-error), (self.tail_mass_R + math.log1p(error)).clamp(max=0)

    def _head_bounds(self, tail_lower_R: Tensor, tail_upper_R: Tensor) -> tuple[Tensor, Tensor]:
        held_RK = self.held_RX[:, :self.num_head]
        if self.logprob_bits >= FLOAT32_BITS:
            exact_RK = torch.where(held_RK, self.exact_RK, LOG_NOTHING)
            return exact_RK, exact_RK
        error_RK = _half_unit(self.exact_RK, self.logprob_bits)
        lower_RK = torch.where(held_RK, self.exact_RK - error_RK, LOG_NOTHING)
        upper_RK = torch.where(held_RK, (self.exact_RK + error_RK).clamp(max=0), LOG_NOTHING)
        least_RK, most_RK = lower_RK.exp(), upper_RK.exp()
        left_lower_RK = (1 - tail_upper_R.exp() - most_RK.sum(1))[:, None] + most_RK - _SUM_ERROR
        left_upper_RK = (1 - tail_lower_R.exp() - least_RK.sum(1))[:, None] + least_RK + _SUM_ERROR
        # Brought into what rounding alone allows, so that a row that does not add up keeps an interval.
        return (torch.maximum(lower_RK, torch.minimum(left_lower_RK, most_RK).clamp(min=0).log()),
                torch.minimum(upper_RK, torch.maximum(left_upper_RK, least_RK).log()))


def _half_unit(stored_RK: Tensor, bits: int) -> Tensor:
    """Half a unit of the last of `bits` significant bits."""
    # A little upwards, because a number whose shift was undone may come out just below the power of two that it was.
    exponent_RK = torch.frexp(stored_RK * (1 + 1e-5)).exponent
    half_RK = torch.ldexp(torch.full_like(stored_RK, 0.5), exponent_RK - bits)
    return torch.where(stored_RK == 0, 0.0, half_RK)


def _others(z_R: Tensor, part_RK: Tensor) -> Tensor:
    """`log(Z - part)` for each part, as far as that can be told."""
    share_RK = (part_RK - z_R[:, None]).exp().clamp(max=1 - _SUM_ERROR)
    return z_R[:, None] + torch.log1p(-share_RK)


def _logsumexp(values_RX: Tensor) -> Tensor:
    """Of no values at all, LOG_NOTHING."""
    nothing_R1 = values_RX.new_full((len(values_RX), 1), LOG_NOTHING)
    return torch.cat([values_RX, nothing_R1], 1).logsumexp(1)
