"""Rows of engine steps, picked and reduced, against the same rows computed directly.

Catches rows taken from the wrong request of a batch, positions off by one, chunks of a prompt put together wrongly,
rows captured twice after a preemption, and sampled rows that take another request's logits. The engine is a sequence of
random steps over a linear head; whatever the steps, the traces must be the same.
Shapes: T tokens, N rows of a step, L layers, H hidden size, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pipe.errors import CaptureError
from distill_pipe.produce.assembly import Assembler, FinishedTrace
from distill_pipe.produce.step import NO_TOKEN, Request, StepCapture, StepView, Wanted
from distill_pipe.store.spec import CaptureSpec
from distill_pipe.store.trace import Trace

HIDDEN, VOCAB, LAYERS = 8, 300, (1, 2)
CAPTURE = CaptureSpec(top_k=5, tail_samples=3, layers=LAYERS, hidden_codec="f32", logprob_bits=24)


@dataclass(frozen=True)
class Sequence:
    """A finished sequence as a deterministic target would have run it."""

    ordinal: int
    token_ids: list[int]
    loss_mask: list[bool]
    given: bool

    @property
    def prompt_length(self) -> int:
        return len(self.token_ids) - 1 if self.given else self.loss_mask.index(True)

    def states(self, layer: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * self.ordinal + layer)
        return torch.randn(len(self.token_ids), HIDDEN, generator=generator)


HEAD_HV = torch.randn(HIDDEN, VOCAB, generator=torch.Generator().manual_seed(7)) * 2


def compute_logits(states_NH: torch.Tensor) -> torch.Tensor:
    return states_NH @ HEAD_HV


def request_of(sequence: Sequence) -> Request:
    prompt = np.array(sequence.token_ids[:sequence.prompt_length], np.int64)
    if not sequence.given:
        return Request(Wanted(sequence.ordinal, ((len(prompt) - 1, 10_000),), NO_TOKEN), prompt)
    edges = np.flatnonzero(np.diff([False, *sequence.loss_mask[1:], False])).reshape(-1, 2)
    ranges = tuple((int(a), int(b)) for a, b in edges)
    return Request(Wanted(sequence.ordinal, ranges, sequence.token_ids[-1]), prompt)


def view_of(parts: list[tuple[Sequence, int, int]], with_logits: bool) -> StepView:
    """A step in which each sequence computes positions [start, stop)."""
    final_NH = torch.cat([s.states(0)[a:b] for s, a, b in parts])
    last = np.cumsum([b - a for _, a, b in parts]) - 1
    return StepView([str(s.ordinal) for s, _, _ in parts], np.array([a for _, a, _ in parts]),
                    np.array([b - a for _, a, b in parts]), final_NH,
                    [torch.cat([s.states(n)[a:b] for s, a, b in parts]) for n in LAYERS],
                    compute_logits(final_NH[torch.from_numpy(last)]) if with_logits else None)


def expected_next(sequence: Sequence) -> np.ndarray:
    logprobs_TV = compute_logits(sequence.states(0)).log_softmax(-1)
    rows = np.flatnonzero(sequence.loss_mask[1:])
    return np.array([logprobs_TV[t, sequence.token_ids[t + 1]] for t in rows], np.float32)


def finish(assembler: Assembler, sequence: Sequence) -> Trace:
    reported = [] if sequence.given else expected_next(sequence).tolist()
    return assembler.finish(FinishedTrace(sequence.ordinal, "p", None, "stop", sequence.token_ids, sequence.loss_mask,
                                          reported))


def assert_right(trace: Trace, sequence: Sequence) -> None:
    logprobs_RV = compute_logits(sequence.states(0)).log_softmax(-1)[torch.from_numpy(trace.positions_R)]
    top = logprobs_RV.topk(5)
    assert trace.topk_ids_N.tolist() == top.indices.reshape(-1).tolist()
    np.testing.assert_allclose(trace.topk_logprobs_N, top.values.reshape(-1), atol=1e-5)
    np.testing.assert_allclose(trace.tail_mass_R, 1 - top.values.exp().sum(-1), atol=1e-5)
    np.testing.assert_allclose(trace.next_logprob_R, expected_next(sequence), atol=1e-5)
    for layer in LAYERS:
        np.testing.assert_array_equal(trace.hidden[layer], sequence.states(layer)[:-1].numpy())


@st.composite
def sequences(draw: st.DrawFn, ordinal: int) -> Sequence:
    length = draw(st.integers(3, 12))
    token_ids = draw(st.lists(st.integers(0, VOCAB - 1), min_size=length, max_size=length))
    if draw(st.booleans()):
        mask = [False, *draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))]
        mask[draw(st.integers(1, length - 1))] = True
        return Sequence(ordinal, token_ids, mask, given=True)
    prompt = draw(st.integers(1, length - 1))
    return Sequence(ordinal, token_ids, [False] * prompt + [True] * (length - prompt), given=False)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[Sequence], list[list[tuple[Sequence, int, int]]]]:
    """Sequences, and steps that run them in any chunks and any company, with preemptions that start one over."""
    found = [draw(sequences(i)) for i in range(draw(st.integers(1, 4)))]
    done = dict.fromkeys(range(len(found)), 0)
    steps = []
    preemptions = draw(st.integers(0, 2))
    while any(done[s.ordinal] < len(s.token_ids) - 1 for s in found):
        step = []
        for sequence in draw(st.permutations(found)):
            start, end = done[sequence.ordinal], len(sequence.token_ids) - 1
            if start == end:
                continue
            if start and preemptions and draw(st.booleans()):
                preemptions, start = preemptions - 1, 0
            # A prompt goes in chunks; after it, and after what was computed before, one token at a time.
            known = max(sequence.prompt_length, done[sequence.ordinal] + 1)
            stop = draw(st.integers(start + 1, min(max(known, start + 1), end)))
            step.append((sequence, start, stop))
            done[sequence.ordinal] = max(stop, done[sequence.ordinal]) if start else stop
        steps.append(step)
    return found, steps


@settings(max_examples=150, deadline=None)
@given(schedules(), st.booleans())
def test_any_schedule_gives_the_same_traces(schedule, with_logits: bool) -> None:
    found, steps = schedule
    capture, assembler = StepCapture(CAPTURE, 3, compute_logits), Assembler(LAYERS)
    for sequence in found:
        capture.open(str(sequence.ordinal), request_of(sequence))
    for step in steps:
        for ordinal, rows in capture.step(view_of(step, with_logits)):
            assembler.add(ordinal, rows)
    for sequence in found:
        assert_right(finish(assembler, sequence), sequence)


@pytest.mark.parametrize("shift", [-1, 1])
def test_states_shifted_by_one_position_are_refused_when_the_trace_is_finished(shift: int) -> None:
    # The engine reports the likeliest token of each row, so that every one of them is in the head.
    states = Sequence(0, [0] * 6, [False, False, True, True, True, True], given=False)
    likeliest = compute_logits(states.states(0)).argmax(-1).tolist()
    sequence = Sequence(0, [5, 9, *likeliest[1:5]], states.loss_mask, given=False)
    view = view_of([(sequence, 0, 5)], with_logits=False)
    for roll, refused in ((0, False), (shift, True)):
        capture, assembler = StepCapture(CAPTURE, 3, compute_logits), Assembler(LAYERS)
        capture.open("0", request_of(sequence))
        shifted = StepView(view.request_ids, view.starts, view.lengths, view.hidden_NH.roll(roll, 0), view.aux, None)
        for ordinal, rows in capture.step(shifted):
            assembler.add(ordinal, rows)
        if refused:
            with pytest.raises(CaptureError, match="is not the distribution that token"):
                finish(assembler, sequence)
        else:
            assert_right(finish(assembler, sequence), sequence)


def test_requests_that_are_not_ours_and_finished_ones_leave_no_rows() -> None:
    sequence = Sequence(0, [1, 2, 3, 4], [False, True, True, True], given=True)
    capture = StepCapture(CAPTURE, 0, compute_logits)
    assert capture.step(view_of([(sequence, 0, 3)], with_logits=True)) == []
    capture.open("0", request_of(sequence))
    capture.close(["0"])
    assert capture.step(view_of([(sequence, 0, 3)], with_logits=True)) == []


def test_a_model_that_delivers_fewer_layers_than_asked_is_refused() -> None:
    sequence = Sequence(0, [1, 2, 3, 4], [False, True, True, True], given=True)
    capture = StepCapture(CAPTURE, 0, compute_logits)
    capture.open("0", request_of(sequence))
    view = view_of([(sequence, 0, 3)], with_logits=True)
    with pytest.raises(CaptureError, match="delivers 1 hidden states, asked for were 2"):
        capture.step(StepView(view.request_ids, view.starts, view.lengths, view.hidden_NH, view.aux[:1], view.logits))
