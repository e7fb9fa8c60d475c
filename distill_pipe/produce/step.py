"""One step of an engine: which of its rows are wanted, and what is kept of them. Knows no engine by name.

A step mixes many requests. Every wanted row of it goes through the target's head together, in chunks, so that a decode
step of 64 requests costs a few kernels instead of 64 times a few; a row that the engine sampled from takes the logits
the engine made. Positions that come again after a preemption are dropped: the first copy counts.

Shapes: N all rows of a step, n requests of a step, R head rows, r those that were sampled from, L layers, H hidden
size, V vocabulary.
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
from distill_pipe.produce.captured import CapturedStep, Part, captured_step, codes_in_step, positions_of
from distill_pipe.produce.head import WHOLE, HeadReducer, VocabShard, row_uniforms
from distill_pipe.produce.sizes import CHUNK_ROWS
from distill_pipe.store.spec import CaptureSpec

NO_TOKEN = -1
# The engine's logits and ours come out of products of different shapes: in bfloat16 they differ by half a unit in the
# last place of a logit below 64, which is 0.25. Rows of other positions differ by several nats.
LOGSUMEXP_TOLERANCE = 0.5
CHECKED_STEPS, CHECKED_ROWS = 4, 8


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
        if len(positions) and positions[0] >= len(self.prompt_ids):
            return np.full(len(positions), NO_TOKEN)
        known = np.append(self.prompt_ids, self.wanted.last_token)
        return np.where(positions + 1 < len(known), known[np.minimum(positions + 1, len(known) - 1)], NO_TOKEN)


@dataclass(frozen=True, slots=True)
class StepView:
    """One step of either model runner, in batch order: request i computed `lengths[i]` positions from `starts[i]`,
    which are rows `ends[i] - lengths[i]` to `ends[i]` of the states. The engine sampled `sampled_n[i]` from row i of
    `logits_nV`, which is the request's last row and has not been changed by the sampler."""

    request_ids: list[str]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    hidden_NH: Tensor
    aux: Sequence[Tensor]
    logits_nV: Tensor
    sampled_n: Tensor


@dataclass(slots=True)
class Segment(Part):
    """What is wanted of request `index` of a step: position p is row p + offset of the step's states."""

    request: Request
    index: int
    offset: int


class StepCapture:
    """Picks the wanted rows of each step and reduces them where they are.

    `compute_logits` is the target's head, `[n, H]` states after the final norm to `[n, V]` logits of the tokens in
    `shard`. Where several devices run the same step, each computes its part of the rows, and only the one that `ships`
    returns them. `code` says on which devices the states are coded in the step.
    """

    def __init__(self, capture: CaptureSpec, seed: int, compute_logits: Callable[[Tensor], Tensor],
                 shard: VocabShard = WHOLE, *, ships: bool = True,
                 code: Callable[[torch.device], bool] = codes_in_step) -> None:
        self._capture, self._seed, self._compute_logits, self._ships = capture, seed, compute_logits, ships
        self._whole, self._part = HeadReducer(capture), HeadReducer(capture, shard)
        self._first, self._code = shard.first, code
        self._steps_to_check = CHECKED_STEPS
        self._requests: dict[str, Request] = {}

    def open(self, request_id: str, request: Request) -> None:
        """Capture a request from now on; one that is known already goes on where it was."""
        self._requests.setdefault(request_id, request)

    def close(self, request_ids: Iterable[str]) -> None:
        """Forget requests that are finished."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)

    def step(self, view: StepView) -> CapturedStep | None:
        """What a step yields; None when nothing of it is wanted, or when another device ships it.

        Raises:
            CaptureError: the model does not deliver the hidden states that were asked for, or delivers other rows than
                the engine samples from.
        """
        segments = list(self._segments(view))
        if not segments:
            return None
        if self._capture.layers and len(view.aux) != len(self._capture.layers):
            raise CaptureError(f"the model delivers {len(view.aux)} hidden states, asked for were "
                               f"{len(self._capture.layers)}: it does not support them in this layout")
        head = self._head(view, segments)
        if not self._ships:
            return None
        hidden_LNH = self._states(view, segments) if self._capture.layers else None
        return captured_step(segments, head, hidden_LNH, self._capture.hidden_codec,
                             code=self._code(view.hidden_NH.device))

    def _segments(self, view: StepView) -> Iterator[Segment]:
        """The part of the step that is wanted and not captured yet, request by request.

        A request that computes nothing new was preempted before its last token reached the scheduler; it samples that
        token again, so the row comes again with it, and the trace takes the copy whose token was kept.
        """
        ends = np.cumsum(view.lengths)
        for i, request_id in enumerate(view.request_ids):
            request = self._requests.get(request_id)
            if request is None:
                continue
            stop = int(view.starts[i] + view.lengths[i])
            first = min(max(int(view.starts[i]), request.next_position), stop)
            positions = request.row_positions(min(first, stop - 1), stop)
            if first == stop:
                positions = positions[request.next_tokens(positions) == NO_TOKEN]
            request.next_position = max(stop, request.next_position)
            if first < stop or len(positions):
                yield Segment(request.wanted.ordinal, first, stop, positions, request, i, int(ends[i]) - stop)

    def _states(self, view: StepView, segments: Sequence[Segment]) -> Tensor:
        """Copies of the wanted rows of all layers."""
        offset_N = np.repeat([s.offset for s in segments], [s.stop - s.first for s in segments])
        rows = _on(view, positions_of(segments) + offset_N)
        hidden_LNH = view.aux[0].new_empty(len(view.aux), len(rows), view.aux[0].shape[1])
        for layer, aux_NH in enumerate(view.aux):
            torch.index_select(aux_NH, 0, rows, out=hidden_LNH[layer])
        return hidden_LNH

    def _head(self, view: StepView, segments: Sequence[Segment]) -> list[Tensor]:
        """The stored part of every wanted row of the step, in segment order, and the token that the engine sampled
        from it (NO_TOKEN where the next token was known before)."""
        counts = [len(s.positions) for s in segments]
        positions_R = np.concatenate([s.positions for s in segments])
        ordinal_R, offset_R, stop_R, index_R = np.repeat(
            [(s.ordinal, s.offset, s.stop, s.index) for s in segments], counts, axis=0).T
        uniform_R = row_uniforms(self._seed, ordinal_R, positions_R)
        next_R = np.concatenate([s.request.next_tokens(s.positions) for s in segments])
        state_R, last_R = positions_R + offset_R, positions_R == stop_R - 1
        own, reused = np.flatnonzero(~last_R), np.flatnonzero(last_R)
        index_r = _on(view, index_R[reused])
        if self._steps_to_check and len(reused):
            self._check(view, index_r, _on(view, state_R[reused]))
        parts = [self._own_rows(view, state_R[rows], uniform_R[rows], next_R[rows]) for rows in _chunks(own)]
        if self._ships and len(reused):
            parts.append(self._sampled_rows(view, index_r, uniform_R[reused], _on(view, next_R[reused])))
        if not self._ships or not parts:
            return []
        back = _on(view, np.argsort(np.concatenate([own, reused])))
        return [torch.cat(tensors)[back] for tensors in zip(*parts, strict=True)]

    def _own_rows(self, view: StepView, state_R: NDArray[np.int64], uniform_R: NDArray[np.float32],
                  next_R: NDArray[np.int64]) -> tuple[Tensor, ...]:
        logits_RV = self._compute_logits(view.hidden_NH[_on(view, state_R)])
        rows = self._part.rows(logits_RV, _on(view, uniform_R), _on(view, next_R))
        return (*rows.tensors(), _on(view, np.full(len(state_R), NO_TOKEN)))

    def _sampled_rows(self, view: StepView, index_r: Tensor, uniform_R: NDArray[np.float32],
                      next_r: Tensor) -> tuple[Tensor, ...]:
        sampled_r = torch.where(next_r == NO_TOKEN, view.sampled_n[index_r].long(), NO_TOKEN)
        # In a step of decoding, all rows of the logits are wanted as they are: a copy would be as large as they are.
        every = len(index_r) == len(view.logits_nV)
        logits_rV = view.logits_nV if every else view.logits_nV[index_r]
        rows = self._whole.rows(logits_rV, _on(view, uniform_R), torch.maximum(next_r, sampled_r))
        return (*rows.tensors(), sampled_r)

    def _check(self, view: StepView, index_r: Tensor, state_r: Tensor) -> None:
        """Compare the engine's own logits with those of the rows that we take for theirs: a shift of one row anywhere
        between the engine's layout and ours would show. A few steps of each engine are enough."""
        self._steps_to_check -= 1
        index_r, state_r = index_r[:CHECKED_ROWS], state_r[:CHECKED_ROWS]
        ours_rV = self._compute_logits(view.hidden_NH[state_r]).float()
        theirs_rV = view.logits_nV[index_r, self._first:self._first + ours_rV.shape[1]].float()
        gap = float((ours_rV.logsumexp(-1) - theirs_rV.logsumexp(-1)).abs().max())
        if not gap <= LOGSUMEXP_TOLERANCE:
            raise CaptureError(f"the rows that are captured are not those the engine samples from: their logsumexp "
                               f"differs by {gap:.2f}; this vLLM lays out its batches in another way")


def _chunks(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [rows[i:i + CHUNK_ROWS] for i in range(0, len(rows), CHUNK_ROWS)]


def _on(view: StepView, array: NDArray[Any]) -> Tensor:
    """An array on the step's device."""
    return torch.from_numpy(array).to(view.hidden_NH.device, non_blocking=True)
