"""What a stored row says of the target's distribution: its entries with their weights, at a temperature of 1 or below.

At temperature T a token has p^(1/T) / Z, with Z = sum_v p_v^(1/T) over the whole vocabulary. The head's part of Z is
exact. The tail's is estimated from the tail samples: each stands for `w p^(1/T)` with its weight `w = P / (M p)`, which
is unbiased for Z, and nearly so for what is divided by it, since a tail matters less the lower the temperature. Bounds
need no samples: the N tail entries add up to P, and none is above the smallest head entry c, so

    P^(1/T) N^(1 - 1/T)  <=  sum over the tail of p^(1/T)  <=  P min(c, P)^(1/T - 1)

Above 1 a sample's part of Z has no bound, so T > 1 is refused. Everything is in logs, and LOG_NOTHING where there is
nothing.

Shapes: R rows, K head entries, M tail samples, X head entries and then samples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill_pipe.consume.lookup import LOG_NOTHING
from distill_pipe.consume.sparse import SparseTarget


@dataclass(frozen=True, slots=True, eq=False)
class Tempered:
    """Logs, at a temperature: of Z and its bounds, of the tail's mass and the most it can be, and of the most that one
    tail entry can be."""

    z_R: Tensor
    z_lower_R: Tensor
    z_upper_R: Tensor
    tail_mass_R: Tensor
    tail_upper_R: Tensor
    cap_R: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class StoredRows:
    """The entries of R rows at temperature 1: `num_head` columns of the head, then the samples.

    `logw_RX` is the log of the weight: 0 in the head, of `P / (M p)` for a sample. `tail_tokens_R` is the N above.
    """

    ids_RX: Tensor
    held_RX: Tensor
    logp_RX: Tensor
    logw_RX: Tensor
    tail_mass_R: Tensor
    tail_tokens_R: Tensor
    num_head: int

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
        return cls(ids_RX, held_RX, logp_RX, logw_RX, log_tail_R, tail_tokens_R, num_head)

    def at(self, temperature: float) -> Tempered:
        """What the temperature makes of each row. At 1, Z is 1, whatever the entries add up to after rounding."""
        smallest_R = torch.where(self.held_RX, self.logp_RX, 0.0)[:, :self.num_head].clamp(max=0)
        smallest_R = torch.cat([smallest_R, self.tail_mass_R[:, None]], 1).amin(1)
        if temperature == 1:
            one_R = torch.zeros_like(smallest_R)
            return Tempered(one_R, one_R, one_R, self.tail_mass_R, self.tail_mass_R, smallest_R)
        power = 1 / temperature
        parts_RX = power * self.logp_RX + self.logw_RX
        head_R, sampled_R = (_logsumexp(part) for part in (parts_RX[:, :self.num_head], parts_RX[:, self.num_head:]))
        lower_R = power * self.tail_mass_R + (1 - power) * self.tail_tokens_R.clamp(min=1).log()
        upper_R = self.tail_mass_R + (power - 1) * smallest_R
        z_R, z_lower_R, z_upper_R = (torch.logaddexp(head_R, tail_R) for tail_R in (sampled_R, lower_R, upper_R))
        return Tempered(z_R, z_lower_R, z_upper_R, sampled_R - z_R, upper_R - z_upper_R, power * smallest_R - z_lower_R)


def _logsumexp(values_RX: Tensor) -> Tensor:
    """Of no values at all, LOG_NOTHING."""
    nothing_R1 = values_RX.new_full((len(values_RX), 1), LOG_NOTHING)
    return torch.cat([values_RX, nothing_R1], 1).logsumexp(1)
