"""A vocabulary as a list of weighted entries, and what KL and alpha are over such a list.

    alpha = sum_x w min(p, q)       KL(p || q) = sum_x w p log p/q       KL(q || p) = sum_x w (q log q/p - q + p)

with p an entry's probability and w how many tokens of that kind it stands for: 1 for a token of the head, `P / (M p)`
for one of M samples of a tail of mass P. The last form is the usual `sum q log q/p` once both sides add up to 1, and
each of its terms is non-negative and flat at q = p, which terms of the usual form are not; so it may be sampled, or cut
off.

Shapes: R rows, X entries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill_pipe.consume.lookup import LOG_NOTHING


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What a comparison makes of each row, with gradients except for the bounds.

    `usable_R` is not set where p and q share no entry: there alpha is 0, and its log is of no use.
    """

    kl_R: Tensor
    reverse_kl_R: Tensor
    log_alpha_R: Tensor
    lower_R: Tensor
    upper_R: Tensor
    usable_R: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """`log p`, the log of the weight, and `log q` of each entry; finite, and of no use where not held.

    `log_inside_R` is the log of the share of p that lies inside the draft's vocabulary. Both KL take p divided by it,
    entry by entry, so that terms stay what the module says of them whichever entries are there; alpha does not. 0
    where nothing lies outside, or nothing inside.
    """

    held_RX: Tensor
    logp_RX: Tensor
    logw_RX: Tensor
    logq_RX: Tensor
    log_inside_R: Tensor

    def kl(self) -> Tensor:
        """KL(p || q) of each row."""
        logp_RX = self._logp_inside()
        return self._sum((self.logw_RX + logp_RX).exp() * (logp_RX - self.logq_RX))

    def reverse_kl(self) -> Tensor:
        """KL(q || p) of each row."""
        logp_RX = self._logp_inside()
        ratio_RX = torch.where(self.held_RX, self.logq_RX - logp_RX, 0.0)
        mass_RX = self.logw_RX + logp_RX
        return self._sum((mass_RX + ratio_RX).exp() * (ratio_RX - 1) + mass_RX.exp())

    def log_alpha(self) -> Tensor:
        """The log of alpha of each row; about LOG_NOTHING where no entry is held."""
        # `minimum` passes half a gradient at p = q, which is the sign(0) = 0 of arXiv 2602.23881 eq. 3.
        shared_RX = self.logw_RX + torch.minimum(self.logp_RX, self.logq_RX)
        return torch.where(self.held_RX, shared_RX, LOG_NOTHING).logsumexp(1)

    def rows(self, lower_R: Tensor, upper_R: Tensor) -> Rows:
        """All of it, beside bounds that were found elsewhere."""
        return Rows(self.kl(), self.reverse_kl(), self.log_alpha(), lower_R, upper_R, self.held_RX.any(1))

    def _logp_inside(self) -> Tensor:
        return self.logp_RX - self.log_inside_R[:, None]

    def _sum(self, values_RX: Tensor) -> Tensor:
        return torch.where(self.held_RX, values_RX, 0.0).sum(1)


def log_inside(held_RX: Tensor, log_mass_RX: Tensor) -> Tensor:
    """`Entries.log_inside_R` from the log of the mass that each entry stands for."""
    log_R = torch.where(held_RX, log_mass_RX, LOG_NOTHING).logsumexp(1)
    return torch.where(held_RX.any(1), log_R, 0.0)
