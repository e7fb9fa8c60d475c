"""Draft logits that are never whole: hidden states and an lm_head, multiplied a chunk of rows at a time.

`FusedLogits(states_RH, lm_head.weight)` stands in every loss where logits would. Loss and gradients are those of the
logits it replaces, up to the order of sums; in memory it holds one chunk of them. The trade-off: the forward pass keeps
K + M numbers per row and the backward pass multiplies again, four products in place of three. Gradients made in the
forward pass would save that one, but the weight of the hybrid loss needs the mean alpha of all rows first: it would
take two gradients of the size of the lm_head, or the first product twice anyhow.

States and head are multiplied in the head's type (bfloat16 parameters give bfloat16 logits, as outside), or in
autocast's; the loss is float32 from there on, and the head's gradient is summed over chunks in float32. A frozen head
gets no gradient, and no product for it. A tied one is any tensor that is used elsewhere too.

Under DDP and FSDP2 build it, and compute the loss, inside the wrapped module's `forward`: that is where FSDP2 has the
whole weight, and where DDP looks for parameters in use. `torch.compile` leaves the graph here and returns to it after.

Shapes: R rows, C rows of a chunk, H hidden size, D draft vocabulary, X tokens looked up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from distill_pipe.consume.lookup import Query, answers, write_gradient
from distill_pipe.errors import UsageError


@dataclass(frozen=True, slots=True, eq=False)
class FusedLogits:
    """The logits `states_RH @ weight_DH.T (+ bias_D)`, of which `chunk_rows` rows are alive at a time.

    At D = 128,256 in float32, 256 rows are 131 MB.

    Raises:
        UsageError: the shapes do not fit each other.
    """

    states_RH: Tensor
    weight_DH: Tensor
    bias_D: Tensor | None = None
    chunk_rows: int = 256

    def __post_init__(self) -> None:
        if self.states_RH.ndim != 2 or self.weight_DH.ndim != 2 or self.states_RH.shape[1] != self.weight_DH.shape[1]:
            raise UsageError(f"draft states of shape {tuple(self.states_RH.shape)} do not fit an lm_head of shape "
                             f"{tuple(self.weight_DH.shape)}")
        if self.chunk_rows < 1:
            raise UsageError(f"chunk_rows must be at least 1, and is {self.chunk_rows}")

    @property
    def shape(self) -> tuple[int, int]:
        """`(R, D)`, as of the logits."""
        return len(self.states_RH), len(self.weight_DH)

    @property
    def device(self) -> torch.device:
        return self.states_RH.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the logits."""
        kind = self.device.type
        cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return torch.get_autocast_dtype(kind) if cast else self.weight_DH.dtype

    def __getitem__(self, rows: slice) -> "FusedLogits":
        return FusedLogits(self.states_RH[rows], self.weight_DH, self.bias_D, self.chunk_rows)

    def logits(self) -> Tensor:
        """The logits of all rows, `[R, D]`."""
        bias_D = None if self.bias_D is None else self.bias_D.to(self.dtype)
        return functional.linear(self.states_RH.to(self.dtype), self.weight_DH.to(self.dtype), bias_D)

    def look_up(self, query: Query) -> tuple[Tensor, Tensor]:
        """See `lookup.look_up`."""
        logq_RX, capped_R = _FusedLookUp.apply(  # type: ignore[no-untyped-call]
            self.states_RH, self.weight_DH, self.bias_D, query, self.chunk_rows, self.dtype)
        return logq_RX, capped_R


class _FusedLookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_RH: Tensor, weight_DH: Tensor, bias_D: Tensor | None, query: Query, chunk_rows: int,
                dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(states_RH, weight_DH, bias_D)
        ctx.query, ctx.chunk_rows, ctx.dtype = query, chunk_rows, dtype
        head = _Head(weight_DH, bias_D, dtype)
        parts = [answers(head.logits(states_RH[rows]), query[rows]) for rows in _chunks(states_RH, chunk_rows)]
        logq_RX, capped_R = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.mark_non_differentiable(capped_R)
        return logq_RX, capped_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RX: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        states_RH, weight_DH, bias_D = ctx.saved_tensors
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        head = _Head(weight_DH, bias_D, ctx.dtype)
        states_grad_RH = torch.empty_like(states_RH) if wants_states else None
        weight_grad_DH = _sums(weight_DH) if wants_weight else None
        bias_grad_D = _sums(bias_D) if wants_bias else None
        for rows in _chunks(states_RH, ctx.chunk_rows):
            logits_CD = head.logits(states_RH[rows])
            # The gradient takes the place of the logits, so that no second chunk is alive.
            grad_CD = write_gradient(logits_CD, ctx.query[rows], grad_RX[rows], logits_CD)
            if states_grad_RH is not None:
                states_grad_RH[rows] = grad_CD @ head.weight_DH
            if weight_grad_DH is not None:
                _add_product(weight_grad_DH, grad_CD, states_RH[rows].to(ctx.dtype))
            if bias_grad_D is not None:
                bias_grad_D += grad_CD.sum(0, dtype=bias_grad_D.dtype)
            del logits_CD, grad_CD
        return (states_grad_RH, None if weight_grad_DH is None else weight_grad_DH.to(weight_DH.dtype),
                None if bias_grad_D is None else bias_grad_D.to(bias_D.dtype), None, None, None)


class _Head:
    """An lm_head in the type it is multiplied in, which is autocast's in the backward pass too, where it is not on."""

    def __init__(self, weight_DH: Tensor, bias_D: Tensor | None, dtype: torch.dtype) -> None:
        self.weight_DH, self._bias_D = weight_DH.to(dtype), None if bias_D is None else bias_D.to(dtype)

    def logits(self, states_CH: Tensor) -> Tensor:
        return functional.linear(states_CH.to(self.weight_DH.dtype), self.weight_DH, self._bias_D)


def _chunks(states_RH: Tensor, chunk_rows: int) -> Iterator[slice]:
    for start in range(0, max(1, len(states_RH)), chunk_rows):
        yield slice(start, start + chunk_rows)


def _sums(parameter: Tensor) -> Tensor:
    """Zeros to add a gradient up in: never narrower than float32."""
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


def _add_product(sums_DH: Tensor, grad_CD: Tensor, states_CH: Tensor) -> None:
    if sums_DH.dtype == grad_CD.dtype:
        sums_DH.addmm_(grad_CD.T, states_CH)
    else:
        sums_DH += grad_CD.T @ states_CH
