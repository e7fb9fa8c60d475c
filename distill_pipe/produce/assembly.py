"""Rows as the engine delivers them, step by step, back to one trace per prompt.

The engine mixes many requests in a step, splits one prompt over several steps, and computes rows again after a
preemption. Whatever the order, a trace is accepted only when every supervised row and every hidden state is there
exactly once, and when each row that a token was sampled from saw the very token that the engine delivered in the end;
that second check is independent of our own bookkeeping and would catch rows shifted by one. States stay in memory coded
until their trace is whole, beside the raw ones of a few positions, whose error is measured then.

Shapes: T tokens, R supervised rows, n rows of one step, m of them that are measured, L layers, H hidden size, P planes
of W bytes of a coded row.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_pipe.errors import CaptureError
from distill_pipe.produce.engine import FinishedTrace
from distill_pipe.store.hidden_codec import CodedRows, as_tensor, encoded_trace, is_measured
from distill_pipe.store.sidecar import EncodedTrace
from distill_pipe.store.spec import CaptureSpec
from distill_pipe.store.trace import Trace


@dataclass(slots=True)
class CodedStates:
    """States of consecutive positions as `CodedRows`, for each layer, and raw (bfloat16 bits or float32) those of the
    positions that are measured, None where there is none."""

    codes_LnPW: NDArray[np.uint8]
    scale_Ln: NDArray[np.float32]
    exact_LmH: NDArray[Any] | None


@dataclass(slots=True)
class StepRows:
    """What one engine step yields for one prompt: states of consecutive positions from `first_position`, and head rows
    for the positions in `positions_n`. `head` follows `HeadRows.tensors()`, then the token that was sampled from each
    row, -1 where it was known before."""

    first_position: int
    states: CodedStates | None
    positions_n: NDArray[np.int64]
    head: tuple[NDArray[Any], ...]


class Assembler:
    """Collects step rows by prompt and turns them into traces."""

    def __init__(self, capture: CaptureSpec) -> None:
        self._capture = capture
        self._steps: dict[int, list[StepRows]] = defaultdict(list)

    def add(self, ordinal: int, rows: StepRows) -> None:
        """Keep what a step delivered for a prompt."""
        self._steps[ordinal].append(rows)

    def drop(self, ordinal: int) -> None:
        """Forget a prompt that will not become a trace."""
        self._steps.pop(ordinal, None)

    def finish(self, done: FinishedTrace) -> EncodedTrace:
        """The trace of a finished prompt, as it is stored.

        Raises:
            CaptureError: rows are missing, doubled, or another token was drawn from them than the prompt has.
            NotFiniteError: a value is NaN or infinite.
        """
        steps = self._steps.pop(done.ordinal, [])
        trace = _without_states(done, steps)
        if not self._capture.layers:
            return EncodedTrace(trace)
        coded, exact = self._states(steps, trace)
        return encoded_trace(trace, coded, exact, self._capture.hidden_codec)

    def _states(self, steps: list[StepRows], trace: Trace) -> tuple[dict[int, CodedRows], dict[int, Tensor]]:
        """By layer: the coded states of all positions, and the raw ones of those that are measured."""
        parts = sorted(((s.first_position, s.states) for s in steps if s.states is not None), key=lambda part: part[0])
        found = np.concatenate([np.arange(p, p + h.scale_Ln.shape[1]) for p, h in parts] or [np.empty(0, np.int64)])
        length = len(_exactly_once(found, np.arange(trace.num_tokens - 1), trace.ordinal, "hidden state"))
        # The parts are in order and every position is there once: what comes after those is past the end.
        layers, _, planes, width = parts[0][1].codes_LnPW.shape
        # One plane after the other, as a blob has them, so that this is the last time that all of them are moved about.
        codes_LPnW = np.empty((layers, planes, len(found), width), np.uint8)
        np.concatenate([h.codes_LnPW.transpose(0, 2, 1, 3) for _, h in parts], axis=2, out=codes_LPnW)
        codes_LTPW = codes_LPnW[:, :, :length].transpose(0, 2, 1, 3)
        scale_LT = np.concatenate([h.scale_Ln for _, h in parts], axis=1)[:, :length]
        measured = np.count_nonzero(is_measured(np.arange(length)))
        exact_LMH = as_tensor(np.concatenate([h.exact_LmH for _, h in parts if h.exact_LmH is not None],
                                             axis=1)[:, :measured])
        coded = {n: CodedRows(torch.from_numpy(codes_LTPW[i]), torch.from_numpy(scale_LT[i]))
                 for i, n in enumerate(self._capture.layers)}
        return coded, dict(zip(self._capture.layers, exact_LMH, strict=True))


def _without_states(done: FinishedTrace, steps: list[StepRows]) -> Trace:
    token_ids_T = np.asarray(done.token_ids, np.int32)
    mask_T = np.asarray(done.loss_mask, bool)
    wanted_R = np.flatnonzero(mask_T[1:])
    with_rows = [s for s in steps if len(s.positions_n)]
    if not len(wanted_R):
        raise CaptureError(f"prompt {done.ordinal}: no token is supervised")
    found_n = np.concatenate([s.positions_n for s in with_rows] or [wanted_R[:0]])
    fields = [np.concatenate(parts) for parts in zip(*(s.head for s in with_rows), strict=True)]
    kept = _kept_copies(found_n, fields[-1], token_ids_T, done.ordinal) if fields else np.empty(0, np.int64)
    order = kept[_exactly_once(found_n[kept], wanted_R, done.ordinal, "head row")]
    topk_ids_RK, topk_lp_RK, lse_R, mass_R, tail_ids_RM, tail_lp_RM, next_R, _ = (f[order] for f in fields)
    head_RK, sampled_RM = topk_ids_RK >= 0, tail_ids_RM >= 0
    return Trace(
        ordinal=done.ordinal, prompt_id=done.prompt_id, domain=done.domain, finish_reason=done.finish_reason,
        token_ids_T=token_ids_T, loss_mask_T=mask_T, logsumexp_R=lse_R, tail_mass_R=mass_R, next_logprob_R=next_R,
        topk_counts_R=head_RK.sum(1).astype(np.int32), topk_ids_N=topk_ids_RK[head_RK].astype(np.int32),
        topk_logprobs_N=topk_lp_RK[head_RK],
        tail_counts_R=sampled_RM.sum(1).astype(np.int32), tail_ids_N=tail_ids_RM[sampled_RM].astype(np.int32),
        tail_logprobs_N=tail_lp_RM[sampled_RM])


def _exactly_once(found: NDArray[np.int64], wanted: NDArray[np.int64], ordinal: int, what: str) -> NDArray[np.int64]:
    """Where in `found` each wanted position lies. Positions past the last wanted one are what an engine that runs ahead
    computed after the end; any other surplus is an error."""
    order = np.argsort(found, kind="stable")
    positions = found[order]
    inside = positions <= (wanted[-1] if len(wanted) else -1)
    if not np.array_equal(positions[inside], wanted):
        missing = np.setdiff1d(wanted, positions)
        raise CaptureError(f"prompt {ordinal}: {len(missing)} of {len(wanted)} {what}s are missing (first at position "
                           f"{missing[0] if len(missing) else '-'}), {int(inside.sum())} were delivered")
    return order[inside]


def _kept_copies(positions_n: NDArray[np.int64], sampled_n: NDArray[np.int64], token_ids_T: NDArray[np.int32],
                 ordinal: int) -> NDArray[np.int64]:
    """Which rows to keep, in order of position. A preemption can throw a sampled token away; its row then came twice,
    and the copy counts whose token the engine delivered.

    Raises:
        CaptureError: no copy of a row saw its token.
    """
    inside_n = positions_n + 1 < len(token_ids_T)
    following_n = token_ids_T[np.where(inside_n, positions_n + 1, 0)]
    agrees_n = (sampled_n < 0) | (sampled_n == following_n) | ~inside_n
    strange = np.setdiff1d(positions_n, positions_n[agrees_n])
    if len(strange):
        raise CaptureError(f"prompt {ordinal}: the row at position {strange[0]} is not the distribution that token "
                           f"{strange[0] + 1} was drawn from ({len(strange)} such rows)")
    order = np.flatnonzero(agrees_n)[np.argsort(positions_n[agrees_n], kind="stable")]
    again = np.append(False, np.diff(positions_n[order]) == 0) & (sampled_n[order] >= 0)
    return order[~again]
