"""What a loss needs of the draft's logits: log q at some tokens of each row, and the gradient that goes back.

    log q_x = z_x - logsumexp z          dL/dz = scatter(g) - (sum g) softmax(z)    with g_x = dL / d log q_x

Whatever is computed from the K + M looked-up numbers, its gradient is one softmax, scaled row by row, and K + M
additions. So nothing of the size of the logits is kept between forward and backward but the logits themselves, and
rows are gone through in pieces that stay in the processor's cache. The trade-off: the softmax is computed twice, which
costs less time than writing it to memory and reading it again.

Shapes: R rows, X tokens asked for, D entries of the draft's vocabulary. The looked-up `logq_RX` has a column more, X1,
when the mass outside the tokens is asked for as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# The log of no probability at all. Finite, so that a row without anything else is a large number and never inf - inf.
LOG_NOTHING = -1e30
# On a CPU a piece and its softmax stay in the cache, with rows enough for several threads; a GPU wants large kernels.
_CPU_PIECE_BYTES, _DEVICE_PIECE_BYTES = 1 << 23, 1 << 28


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """What is asked of R rows of draft logits, at a temperature: q = softmax(z / temperature).

    `ids_RX` are ids of the draft's vocabulary. Where `held_RX` is not set the answer is of no use, and the id is any
    valid one. With `outside`, `log sum q` over all tokens but the held ones is asked for too: from the logits, since
    `1 - sum q` in float32 knows nothing below 1e-7.
    """

    ids_RX: Tensor
    held_RX: Tensor
    cap_R: Tensor
    temperature: float = 1.0
    outside: bool = False

    def __getitem__(self, rows: slice) -> "Query":
        return Query(self.ids_RX[rows], self.held_RX[rows], self.cap_R[rows], self.temperature, self.outside)


def look_up(logits_RD: Tensor, query: Query) -> tuple[Tensor, Tensor]:
    """`log q` of the tokens asked for, with a gradient, and `sum_v min(cap, q_v)` without one.

    Both are float32, or float64 for float64 logits.
    """
    logq_RX, capped_R = _LookUp.apply(logits_RD, query)  # type: ignore[no-untyped-call]
    return logq_RX, capped_R


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_RD: Tensor, query: Query) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits_RD)
        ctx.query = query
        logq_RX, capped_R = answers(logits_RD, query)
        ctx.mark_non_differentiable(capped_R)
        return logq_RX, capped_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RX: Tensor, _: Tensor) -> tuple[Tensor, None]:
        logits_RD, = ctx.saved_tensors
        return write_gradient(logits_RD, ctx.query, grad_RX, torch.empty_like(logits_RD)), None


def answers(logits_RD: Tensor, query: Query) -> tuple[Tensor, Tensor]:
    """`look_up` without a gradient."""
    parts = [_answer(logits_RD[rows], query[rows]) for rows in _pieces(logits_RD)]
    logq, capped = zip(*parts, strict=True)
    return torch.cat(logq), torch.cat(capped)


def write_gradient(logits_RD: Tensor, query: Query, grad_RX: Tensor, out_RD: Tensor) -> Tensor:
    """Turn the gradient of the looked-up numbers into that of the logits. `out_RD` may be the logits."""
    for rows in _pieces(logits_RD):
        out_RD[rows] = _gradient(logits_RD[rows], query[rows], grad_RX[rows])
    return out_RD


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses are computed in: float32, and float64 where the logits are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _answer(logits_RD: Tensor, query: Query) -> tuple[Tensor, Tensor]:
    z_RD = _scaled(logits_RD, query)
    q_RD = z_RD.softmax(1)
    # The largest q is 1 / sum exp(z - max z), so the two maxima give the logsumexp without another exponential.
    lse_R1 = z_RD.amax(1, keepdim=True) - q_RD.amax(1, keepdim=True).log()
    logq_RX = z_RD.gather(1, query.ids_RX) - lse_R1
    if query.outside:
        outside_RD = _replaced(z_RD, query, LOG_NOTHING)
        logq_RX = torch.cat([logq_RX, outside_RD.logsumexp(1, keepdim=True) - lse_R1], 1)
    return logq_RX, q_RD.clamp_(max=query.cap_R[:, None]).sum(1)


def _gradient(logits_RD: Tensor, query: Query, grad_RX: Tensor) -> Tensor:
    grad_RX = grad_RX / query.temperature
    z_RD = _scaled(logits_RD, query)
    out_RD = z_RD.softmax(1).mul_(-grad_RX.sum(1, keepdim=True))
    if query.outside:
        grad_RX, outside_R1 = grad_RX[:, :-1], grad_RX[:, -1:]
        tail_RD = _replaced(_replaced(z_RD, query, LOG_NOTHING).softmax(1), query, 0.0)
        out_RD += tail_RD.mul_(outside_R1)
    return out_RD.scatter_add_(1, query.ids_RX, torch.where(query.held_RX, grad_RX, 0.0))


def _scaled(logits_RD: Tensor, query: Query) -> Tensor:
    z_RD = logits_RD.to(working_dtype(logits_RD.dtype))
    return z_RD if query.temperature == 1 else z_RD / query.temperature


def _replaced(values_RD: Tensor, query: Query, value: float) -> Tensor:
    """A copy with `value` at the held tokens."""
    if query.ids_RX.shape[1] == 0:
        return values_RD.clone()
    # What is not held must not be written, so it points to a held token, or in rows without one writes what is there.
    first_R1 = query.held_RX.to(torch.uint8).argmax(1, keepdim=True)
    ids_RX = torch.where(query.held_RX, query.ids_RX, query.ids_RX.gather(1, first_R1))
    fill_R1 = torch.where(query.held_RX.any(1, keepdim=True), value, values_RD.gather(1, ids_RX[:, :1]))
    # In rows without a held token all ids are the same one.
    return values_RD.scatter(1, ids_RX, fill_R1.expand_as(ids_RX))


def _pieces(logits_RD: Tensor) -> Iterator[slice]:
    piece_bytes = _CPU_PIECE_BYTES if logits_RD.device.type == "cpu" else _DEVICE_PIECE_BYTES
    rows = max(1, piece_bytes // (max(1, logits_RD.shape[1]) * 4))
    for start in range(0, max(1, len(logits_RD)), rows):
        yield slice(start, start + rows)
