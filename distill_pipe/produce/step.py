"""One step of an engine: which of its rows are wanted, and what is kept of them. Knows no engine by name.

A step mixes many requests. Every wanted row of it goes through the target's head together, in chunks, so that a decode
step of 64 requests costs a few kernels instead of 64 times a few; a row that the engine sampled from takes the logits
the engine made. Positions that come again after a preemption are dropped: the first copy counts.

Shapes: n rows of one request in one step, N all rows of a step, R head rows, L layers, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_pipe.errors import CaptureError
from distill_pipe.produce.assembly import StepRows
from distill_pipe.produce.head import CHUNK_ROWS, head_rows, row_uniforms
from distill_pipe.store.spec import CaptureSpec

NO_TOKEN = -1


class Wanted(msgspec.Struct, frozen=True, array_like=True):
    """What to capture of one request; travels with it to the engine's worker. `row_ranges` are half-open ranges of
    positions with a head row. `last_token` follows the prompt's last token, or NO_TOKEN when the target will say."""

    ordinal: int
    row_ranges: tuple[tuple[int, int], ...]
    last_token: int


@dataclass(slots=True)
class Request:
    """A request being captured. Positions below `next_position` are captured; after a preemption they come again."""

    wanted: Wanted
    prompt_ids: NDArray[np.int64]
    next_position: int = 0

    def row_positions(self, start: int, stop: int) -> NDArray[np.int64]:
        """The positions in [start, stop) that get a head row."""
        parts = [np.arange(max(start, a), min(stop, b)) for a, b in self.wanted.row_ranges if a < stop and b > start]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def next_tokens(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The token after each position, NO_TOKEN where it is not known yet."""
        known = np.append(self.prompt_ids, self.wanted.last_token)
        return np.where(positions + 1 < len(known), known[np.minimum(positions + 1, len(known) - 1)], NO_TOKEN)


@dataclass(frozen=True, slots=True)
class StepView:
    """One step of either model runner, in batch order: request i computed `lengths[i]` positions from `starts[i]`,
    which are rows `ends[i] - lengths[i]` to `ends[i]` of the states. `logits` row i is of the request's last row."""

    request_ids: list[str]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    hidden_NH: Tensor
    aux: Sequence[Tensor]
    logits: Tensor | None


@dataclass(frozen=True, slots=True)
class Segment:
    """Positions [first, stop) of one request in a step; position p is row p + offset of the step's states."""

    request: Request
    index: int
    first: int
    stop: int
    offset: int
    positions: NDArray[np.int64]

    @property
    def state_rows(self) -> NDArray[np.int64]:
        return np.arange(self.first, self.stop) + self.offset


class StepCapture:
    """Picks the wanted rows of each step and reduces them where they are.

    `compute_logits` is the target's head, `[n, H]` states after the final norm to `[n, V]` logits.
    """

    def __init__(self, capture: CaptureSpec, seed: int, compute_logits: Callable[[Tensor], Tensor]) -> None:
        self._capture, self._seed, self._compute_logits = capture, seed, compute_logits
        self._requests: dict[str, Request] = {}

    def open(self, request_id: str, request: Request) -> None:
        """Capture a request from now on; one that is known already goes on where it was."""
        self._requests.setdefault(request_id, request)

    def close(self, request_ids: Iterable[str]) -> None:
        """Forget requests that are finished."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)

    def step(self, view: StepView) -> list[tuple[int, StepRows]]:
        """What a step yields, as (ordinal, rows) pairs. Called before sampling: samplers change logits in place.

        Raises:
            CaptureError: the model does not deliver the hidden states that were asked for.
        """
        if self._capture.layers and len(view.aux) != len(self._capture.layers):
            raise CaptureError(f"the model delivers {len(view.aux)} hidden states, asked for were "
                               f"{len(self._capture.layers)}: it does not support them in this layout")
        segments = list(self._segments(view))
        if not segments:
            return []
        hidden_nLH = None
        if self._capture.layers:
            rows = torch.from_numpy(np.concatenate([s.state_rows for s in segments])).to(view.hidden_NH.device)
            hidden_nLH = _host(torch.stack([aux_NH[rows] for aux_NH in view.aux], dim=1))
        return _split(segments, self._head(view, segments), hidden_nLH)

    def _segments(self, view: StepView) -> Iterator[Segment]:
        """The part of the step that is wanted and not captured yet, request by request."""
        ends = np.cumsum(view.lengths)
        for i, request_id in enumerate(view.request_ids):
            request = self._requests.get(request_id)
            if request is None:
                continue
            stop = int(view.starts[i] + view.lengths[i])
            first = max(int(view.starts[i]), request.next_position)
            if first < stop:
                request.next_position = stop
                yield Segment(request, i, first, stop, int(ends[i]) - stop, request.row_positions(first, stop))

    def _head(self, view: StepView, segments: Sequence[Segment]) -> tuple[NDArray[Any], ...]:
        """The stored part of every wanted row of the step, in segment order, on the host."""
        uniform_R = np.concatenate([row_uniforms(self._seed, s.request.wanted.ordinal, s.positions) for s in segments])
        next_R = np.concatenate([s.request.next_tokens(s.positions) for s in segments])
        state_R = np.concatenate([s.positions + s.offset for s in segments])
        index_R = np.concatenate([np.full(len(s.positions), s.index) for s in segments])
        sampled_R = np.concatenate([s.positions == s.stop - 1 for s in segments]) & (view.logits is not None)
        own, reused = np.flatnonzero(~sampled_R), np.flatnonzero(sampled_R)
        parts = []
        for rows in (*_chunks(own), *_chunks(reused)):
            if view.logits is not None and sampled_R[rows[0]]:
                logits_RV = view.logits[_on(view, index_R[rows])]
            else:
                logits_RV = self._compute_logits(view.hidden_NH[_on(view, state_R[rows])])
            parts.append(self._reduce(logits_RV, _on(view, uniform_R[rows]), _on(view, next_R[rows])))
        if not parts:
            return ()
        back = np.argsort(np.concatenate([own, reused]))
        return tuple(_host(torch.cat(tensors))[back] for tensors in zip(*parts, strict=True))

    def _reduce(self, logits_RV: Tensor, uniform_R: Tensor, next_R: Tensor) -> tuple[Tensor, ...]:
        rows = head_rows(logits_RV, self._capture, uniform_R)
        chosen_R = logits_RV.gather(1, next_R.clamp(min=0)[:, None]).squeeze(1).float() - rows.logsumexp_R
        return (*rows.tensors(), torch.where(next_R >= 0, chosen_R, torch.nan))


def _chunks(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [rows[i:i + CHUNK_ROWS] for i in range(0, len(rows), CHUNK_ROWS)]


def _on(view: StepView, array: NDArray[Any]) -> Tensor:
    """An array on the step's device."""
    return torch.from_numpy(array).to(view.hidden_NH.device)


def _split(segments: Sequence[Segment], head: tuple[NDArray[Any], ...],
           hidden_nLH: NDArray[Any] | None) -> list[tuple[int, StepRows]]:
    """The step's arrays cut into one `StepRows` per request."""
    split, row, state = [], 0, 0
    for s in segments:
        rows, states = len(s.positions), s.stop - s.first
        hidden = None if hidden_nLH is None else hidden_nLH[state:state + states]
        fields = tuple(field[row:row + rows] for field in head) if rows else ()
        split.append((s.request.wanted.ordinal, StepRows(s.first, hidden, s.positions, fields)))
        row, state = row + rows, state + states
    return split


def _host(tensor: Tensor) -> NDArray[Any]:
    """In host memory, bfloat16 as its bits. The callers pass fresh tensors, so nothing is shared with the engine."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    if tensor.dtype == torch.float16:
        tensor = tensor.float()
    return tensor.numpy()
