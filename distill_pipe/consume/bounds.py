"""Between what alpha must lie, whatever a stored row leaves open: its tail, and the rounding of what is stored.

Of the head `StoredRows` gives an interval for each probability, l <= p <= u, and by the tail's mass one for their sum,
m_l <= sum_S p <= m_u. The sum is what is known best: entries that are too high must be made up for by others that are
too low. For any share s of it,

    sum_S min(p, q)  =  s sum_S p + sum_S (min(p, q) - s p)
                     >= s m_l + sum_S min over p in {l, u} of (min(p, q) - s p)        concave in p: least at an end
                     <= s m_u + sum_S (min(c, q) - s c),  c = q brought into [l, u]    rises up to q and falls behind it

Each s from 0 to 1 gives a bound. The upper one is linear in s, so s = 0 or s = 1 gives the best of all. The lower one
is not: 0, 1/2 and 1 are tried, and the best s would bring the bound closer by at most the same again (measured, not
proven: see the tests, which find the worst p). s = 1/2 is for the draft that is close to the target; there the interval
is about 2^-b times the row's entropy wide, b being the bits that were kept.

To the upper bound the tail adds the least of its own mass, what q has outside the head, and that with each token cut
off at the smallest head entry, because no tail token is likelier than that.

Good to about 1e-6, which is what float32 sums are; with large logits at a low T, which divides them, to 5e-6 / T.

Shapes: R rows, K head entries.
"""

import torch
from torch import Tensor

from distill_pipe.consume.stored import Tempered


@torch.no_grad()
def alpha_bounds(at: Tempered, q_RK: Tensor, capped_R: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the most that alpha of each row can be.

    Args:
        at: the stored rows.
        q_RK: the draft's probability of each head entry; 0 where there is none, or the draft cannot say it.
        capped_R: `sum_v min(cap, q_v)` over the draft's vocabulary.
    """
    lower_RK, upper_RK = at.lower_RK.exp(), at.upper_RK.exp()
    # Of a head that is exact, what float32 makes of its sum must not count for more than the head itself.
    mass_lower_R = torch.minimum(1 - at.tail_upper_R.exp(), upper_RK.sum(1))
    mass_upper_R = torch.maximum(1 - at.tail_lower_R.exp(), lower_RK.sum(1))

    shared_RK = torch.minimum(lower_RK, q_RK)
    risen_RK, room_RK = torch.minimum(upper_RK, q_RK) - shared_RK, upper_RK - lower_RK
    spare_R = mass_lower_R - lower_RK.sum(1)
    gains = [share * spare_R + (risen_RK - share * room_RK).clamp(max=0).sum(1) for share in (0.5, 1.0)]
    least_R = shared_RK.sum(1) + torch.stack(gains).amax(0).clamp(min=0)

    nearest_RK = q_RK.clamp(lower_RK, upper_RK)
    most_R = torch.minimum(nearest_RK, q_RK).sum(1) + (mass_upper_R - nearest_RK.sum(1)).clamp(max=0)

    outside_R = 1 - q_RK.sum(1)
    capped_outside_R = capped_R - torch.minimum(q_RK, at.cap_R.exp()[:, None]).sum(1)
    tail_R = torch.minimum(at.tail_upper_R.exp(), torch.minimum(outside_R, capped_outside_R)).clamp(min=0)
    return least_R, most_R + tail_R
