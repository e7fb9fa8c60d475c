"""Rows as the engine delivers them, step by step, back to one trace per prompt.

The engine mixes many requests in a step, splits one prompt over several steps, and computes rows again after a
preemption. Whatever the order, a trace is accepted only when every supervised row and every hidden state is there
exactly once, and when the log-probability that the engine itself reports for each sampled token equals the captured
one; that second check is independent of our own bookkeeping and would catch rows shifted by one. Raw states stay in
memory until their trace is whole.

Shapes: T tokens, R supervised rows, n rows of one step, L layers, H hidden size.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from distill_pipe.errors import CaptureError
from distill_pipe.store.trace import Trace

# The engine's own log-softmax and ours see the same logits, so they differ by float32 rounding alone.
NEXT_LOGPROB_TOLERANCE = 2e-3


class FinishedTrace(msgspec.Struct, frozen=True, array_like=True):
    """What the driver knows of a finished prompt. `next_logprobs` are the engine's own log-probabilities of the tokens
    it sampled, from the first response token on; empty when the response was given."""

    ordinal: int
    prompt_id: str
    domain: str | None
    finish_reason: str
    token_ids: list[int]
    loss_mask: list[bool]
    next_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class StepRows:
    """What one engine step yields for one prompt: states of consecutive positions from `first_position`, and head rows
    for the positions in `positions_n`. `head` follows `HeadRows.tensors()`, then the next token's log-probability,
    NaN where the engine had not chosen it yet. `hidden_nLH` holds bfloat16 bits or float32."""

    first_position: int
    hidden_nLH: NDArray[np.float32] | NDArray[np.uint16] | None
    positions_n: NDArray[np.int64]
    head: tuple[NDArray[np.float32], ...]


class Assembler:
    """Collects step rows by prompt and turns them into traces."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = tuple(layers)
        self._steps: dict[int, list[StepRows]] = defaultdict(list)

    def add(self, ordinal: int, rows: StepRows) -> None:
        """Keep what a step delivered for a prompt."""
        self._steps[ordinal].append(rows)

    def drop(self, ordinal: int) -> None:
        """Forget a prompt that will not become a trace."""
        self._steps.pop(ordinal, None)

    def finish(self, done: FinishedTrace) -> Trace:
        """The trace of a finished prompt.

        Raises:
            CaptureError: rows are missing, doubled, or do not match the engine's own log-probabilities.
            NotFiniteError: a value is NaN or infinite.
        """
        steps = self._steps.pop(done.ordinal, [])
        token_ids_T = np.asarray(done.token_ids, np.int32)
        mask_T = np.asarray(done.loss_mask, bool)
        wanted_R = np.flatnonzero(mask_T[1:])
        with_rows = [s for s in steps if len(s.positions_n)]
        order = _exactly_once(np.concatenate([s.positions_n for s in with_rows] or [wanted_R[:0]]), wanted_R,
                              done.ordinal, "head row")
        if not with_rows:
            raise CaptureError(f"prompt {done.ordinal}: no token is supervised")
        fields = [np.concatenate(parts)[order] for parts in zip(*(s.head for s in with_rows), strict=True)]
        topk_ids_RK, topk_lp_RK, lse_R, mass_R, tail_ids_RM, tail_lp_RM, next_R = fields
        next_R = _next_logprobs(done, wanted_R, next_R, token_ids_T, topk_ids_RK, topk_lp_RK)
        head_RK, sampled_RM = topk_ids_RK >= 0, tail_ids_RM >= 0
        return Trace(
            ordinal=done.ordinal, prompt_id=done.prompt_id, domain=done.domain, finish_reason=done.finish_reason,
            token_ids_T=token_ids_T, loss_mask_T=mask_T, logsumexp_R=lse_R, tail_mass_R=mass_R, next_logprob_R=next_R,
            topk_counts_R=head_RK.sum(1).astype(np.int32), topk_ids_N=topk_ids_RK[head_RK].astype(np.int32),
            topk_logprobs_N=topk_lp_RK[head_RK],
            tail_counts_R=sampled_RM.sum(1).astype(np.int32), tail_ids_N=tail_ids_RM[sampled_RM].astype(np.int32),
            tail_logprobs_N=tail_lp_RM[sampled_RM], hidden=self._hidden(steps, len(token_ids_T), done.ordinal))

    def _hidden(self, steps: list[StepRows], num_tokens: int,
                ordinal: int) -> dict[int, NDArray[np.float32] | NDArray[np.uint16]]:
        if not self._layers:
            return {}
        parts = [(s.first_position, s.hidden_nLH) for s in steps if s.hidden_nLH is not None]
        found = np.concatenate([np.arange(p, p + len(h)) for p, h in parts] or [np.empty(0, np.int64)])
        order = _exactly_once(found, np.arange(num_tokens - 1), ordinal, "hidden state")
        all_nLH = np.concatenate([h for _, h in parts])
        return {layer: np.ascontiguousarray(all_nLH[order, i]) for i, layer in enumerate(self._layers)}


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


def _next_logprobs(done: FinishedTrace, wanted_R: NDArray[np.int64], captured_R: NDArray[np.float32],
                   token_ids_T: NDArray[np.int32], topk_ids_RK: NDArray[np.float32],
                   topk_lp_RK: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probability of each row's next token, checked against the head."""
    next_R = captured_R
    if done.next_logprobs:
        next_R = np.asarray(done.next_logprobs, np.float32)
        if len(next_R) != len(wanted_R):
            raise CaptureError(f"prompt {done.ordinal}: the engine reported {len(next_R)} sampled tokens, "
                               f"{len(wanted_R)} rows were captured")
    hit_RK = topk_ids_RK == token_ids_T[wanted_R + 1][:, None]
    # In the head a token has its own entry; outside it, it cannot be likelier than the head's last entry.
    last_R1 = np.take_along_axis(topk_lp_RK, (topk_ids_RK >= 0).sum(1, keepdims=True) - 1, 1)
    gap_R = np.where(hit_RK.any(1), np.abs(np.where(hit_RK, topk_lp_RK - next_R[:, None], 0).sum(1)),
                     next_R - last_R1[:, 0])
    if (gap_R > NEXT_LOGPROB_TOLERANCE).any():
        row = int(gap_R.argmax())
        raise CaptureError(f"prompt {done.ordinal}: row {row} is not the distribution that token {row} of the response "
                           f"was drawn from (log-probabilities differ by {gap_R[row]:.3f})")
    return next_R
