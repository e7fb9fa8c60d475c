"""Rows of engine steps, picked and reduced, against the same rows computed directly.

Catches rows taken from the wrong request of a batch, positions off by one, chunks of a prompt put together wrongly,
rows captured twice after a preemption, and sampled rows that take another request's logits. The engine is a sequence of
random steps over a linear head; whatever the steps, the traces must be the same.
Shapes: T tokens, N rows of a step, L layers, H hidden size, V vocabulary.
"""

from dataclasses import asdict, dataclass, replace
from typing import get_args

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pipe.errors import CaptureError
from distill_pipe.produce.assembly import Assembler
from distill_pipe.produce.captured import by_prompt, coded_step, codes_in_step
from distill_pipe.produce.engine import FinishedTrace
from distill_pipe.produce.head import WHOLE, VocabShard
from distill_pipe.produce.step import NO_TOKEN, Request, StepCapture, StepView, Wanted
from distill_pipe.store.hidden_codec import decode_hidden, is_measured, relative_errors
from distill_pipe.store.sidecar import EncodedTrace
from distill_pipe.store.spec import CaptureSpec, HiddenCodec

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


def sampled_by(sequence: Sequence, stop: int) -> int:
    """What the engine samples after a step up to `stop`: the next token, or within a prompt anything at all."""
    token = sequence.token_ids[stop]
    return token if stop >= sequence.prompt_length else (token + 1) % VOCAB


def view_of(parts: list[tuple[Sequence, int, int]], sampled: list[int] | None = None) -> StepView:
    """A step in which each sequence computes positions [start, stop)."""
    final_NH = torch.cat([s.states(0)[a:b] for s, a, b in parts])
    last = np.cumsum([b - a for _, a, b in parts]) - 1
    return StepView([str(s.ordinal) for s, _, _ in parts], np.array([a for _, a, _ in parts]),
                    np.array([b - a for _, a, b in parts]), final_NH,
                    [torch.cat([s.states(n)[a:b] for s, a, b in parts]) for n in LAYERS],
                    compute_logits(final_NH[torch.from_numpy(last)]),
                    torch.tensor([sampled_by(s, b) for s, _, b in parts] if sampled is None else sampled))


def expected_next(sequence: Sequence) -> np.ndarray:
    logprobs_TV = compute_logits(sequence.states(0)).log_softmax(-1)
    rows = np.flatnonzero(sequence.loss_mask[1:])
    return np.array([logprobs_TV[t, sequence.token_ids[t + 1]] for t in rows], np.float32)


def finish(assembler: Assembler, sequence: Sequence) -> EncodedTrace:
    return assembler.finish(FinishedTrace(sequence.ordinal, "p", None, "stop", sequence.token_ids, sequence.loss_mask))


def run(steps: list[StepView], found: list[Sequence], assembler: Assembler, shard: VocabShard = WHOLE,
        spec: CaptureSpec = CAPTURE, in_step: bool = False) -> None:
    capture = StepCapture(spec, 3, compute_logits, shard, code=lambda _: in_step)
    for sequence in found:
        capture.open(str(sequence.ordinal), request_of(sequence))
    for view in steps:
        step = capture.step(view)
        if step is None:
            continue
        assert len(step.states) == (3 if in_step else 1)
        for ordinal, rows in by_prompt(coded_step(step, spec.hidden_codec)):
            assembler.add(ordinal, rows)


def assert_right(encoded: EncodedTrace, sequence: Sequence) -> None:
    trace = encoded.trace
    logprobs_RV = compute_logits(sequence.states(0)).log_softmax(-1)[torch.from_numpy(trace.positions_R)]
    top = logprobs_RV.topk(5)
    assert trace.topk_ids_N.tolist() == top.indices.reshape(-1).tolist()
    np.testing.assert_allclose(trace.topk_logprobs_N, top.values.reshape(-1), atol=1e-5)
    np.testing.assert_allclose(trace.tail_mass_R, 1 - top.values.exp().sum(-1), atol=1e-5)
    np.testing.assert_allclose(trace.next_logprob_R, expected_next(sequence), atol=1e-5)
    for layer in LAYERS:
        assert torch.equal(decode_hidden(encoded.blobs[layer], "f32", HIDDEN, dtype=torch.float32),
                           sequence.states(layer)[:-1])
        assert encoded.errors[layer].tolist() == [0.0] * is_measured(np.arange(trace.num_tokens - 1)).sum()


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
@given(schedules())
def test_any_schedule_gives_the_same_traces(schedule) -> None:
    found, steps = schedule
    assembler = Assembler(CAPTURE)
    run([view_of(step) for step in steps], found, assembler)
    for sequence in found:
        assert_right(finish(assembler, sequence), sequence)


@settings(max_examples=80, deadline=None)
@given(schedules(), st.sampled_from(get_args(HiddenCodec)), st.sampled_from([torch.float32, torch.bfloat16]))
def test_states_coded_in_the_step_and_states_coded_after_it_give_equal_traces(schedule, codec, dtype) -> None:
    found, steps = schedule
    spec = msgspec.structs.replace(CAPTURE, hidden_codec=codec)
    views = [view_of(step) for step in steps]
    views = [replace(v, aux=[aux_NH.to(dtype) for aux_NH in v.aux]) for v in views]
    assemblers = []
    for in_step in (True, False):
        assemblers.append(Assembler(spec))
        run(views, found, assemblers[-1], spec=spec, in_step=in_step)
    for sequence in found:
        a, b = (finish(assembler, sequence) for assembler in assemblers)
        np.testing.assert_equal(asdict(a), asdict(b))
        assert a.trace.num_tokens == len(sequence.token_ids)
        for layer in LAYERS:
            exact_TH = sequence.states(layer)[:-1].to(dtype).float()
            decoded_TH = decode_hidden(a.blobs[layer], codec, HIDDEN, dtype=torch.float32)
            assert relative_errors(exact_TH, decoded_TH)[is_measured(np.arange(len(exact_TH)))].tolist() == (
                pytest.approx(a.errors[layer].tolist(), rel=1e-4, abs=1e-7))


def test_a_gpu_codes_in_the_step_and_a_cpu_does_not() -> None:
    assert codes_in_step(torch.device("cuda", 0))
    assert not codes_in_step(torch.device("cpu"))


WRITTEN = Sequence(0, [5, 9, 20, 30, 40, 50], [False, False, True, True, True, True], given=False)


@pytest.mark.parametrize("shift", [-1, 1])
def test_states_shifted_by_one_position_are_refused_in_the_first_steps(shift: int) -> None:
    view = view_of([(WRITTEN, 0, 4)])
    run([view], [WRITTEN], Assembler(CAPTURE))
    shifted = StepView(view.request_ids, view.starts, view.lengths, view.hidden_NH.roll(shift, 0), view.aux,
                       view.logits_nV, view.sampled_n)
    with pytest.raises(CaptureError, match="are not those the engine samples from"):
        run([shifted], [WRITTEN], Assembler(CAPTURE))


@pytest.mark.parametrize("shift", [-1, 1])
def test_logits_of_another_request_are_refused_when_the_trace_is_finished(shift: int) -> None:
    other = Sequence(1, [7, 8, 21, 31, 41, 51], WRITTEN.loss_mask, given=False)
    assembler = Assembler(CAPTURE)
    views = [view_of([(WRITTEN, a, b), (other, a, b)]) for a, b in ((0, 2), (2, 3), (3, 4), (4, 5))]
    mixed = [StepView(v.request_ids, v.starts, v.lengths, v.hidden_NH, v.aux, v.logits_nV, v.sampled_n.roll(shift))
             for v in views]
    run(mixed, [WRITTEN, other], assembler)
    with pytest.raises(CaptureError, match=r"position 1 is not the distribution that token 2 was drawn from \(4 such"):
        finish(assembler, WRITTEN)


@pytest.mark.parametrize("thrown_away", [60, 30])
def test_a_token_thrown_away_by_a_preemption_and_sampled_again_leaves_the_row_of_the_token_that_stayed(
        thrown_away: int) -> None:
    # The engine samples after position 2, is preempted before the token counts, computes all again, and samples anew.
    steps = [view_of([(WRITTEN, 0, 2)]), view_of([(WRITTEN, 2, 3)], [thrown_away]), view_of([(WRITTEN, 0, 3)]),
             view_of([(WRITTEN, 3, 4)]), view_of([(WRITTEN, 4, 5)])]
    assembler = Assembler(CAPTURE)
    run(steps, [WRITTEN], assembler)
    assert_right(finish(assembler, WRITTEN), WRITTEN)


def test_requests_that_are_not_ours_and_finished_ones_leave_no_rows() -> None:
    sequence = Sequence(0, [1, 2, 3, 4], [False, True, True, True], given=True)
    capture = StepCapture(CAPTURE, 0, compute_logits)
    assert capture.step(view_of([(sequence, 0, 3)])) is None
    capture.open("0", request_of(sequence))
    capture.close(["0"])
    assert capture.step(view_of([(sequence, 0, 3)])) is None


def test_a_model_that_delivers_fewer_layers_than_asked_is_refused() -> None:
    sequence = Sequence(0, [1, 2, 3, 4], [False, True, True, True], given=True)
    capture = StepCapture(CAPTURE, 0, compute_logits)
    capture.open("0", request_of(sequence))
    view = view_of([(sequence, 0, 3)])
    with pytest.raises(CaptureError, match="delivers 1 hidden states, asked for were 2"):
        capture.step(StepView(view.request_ids, view.starts, view.lengths, view.hidden_NH, view.aux[:1], view.logits_nV,
                              view.sampled_n))


def test_a_device_that_does_not_ship_reduces_its_part_and_returns_nothing() -> None:
    sequence = Sequence(0, [1, 2, 3, 4], [False, True, True, True], given=True)
    exchanged: list[torch.Size] = []

    def gather(part_Rn: torch.Tensor) -> torch.Tensor:
        exchanged.append(part_Rn.shape)
        return part_Rn[None]

    capture = StepCapture(CAPTURE, 0, compute_logits, VocabShard(0, 0, gather), ships=False)
    capture.open("0", request_of(sequence))
    assert capture.step(view_of([(sequence, 0, 3)])) is None
    # The rows at 0 and 1 need the others' parts; the one at 2 has the engine's logits, which the first device reduces.
    assert [shape[0] for shape in exchanged] == [2, 2, 2]
