"""Catches rows that are lost, doubled, shifted or given to another prompt between the engine's steps and the trace.

Shapes: T tokens, R supervised rows, n rows of one step, V vocabulary, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distill_pipe.errors import CaptureError, NotFiniteError
from distill_pipe.produce.assembly import Assembler, StepRows
from distill_pipe.produce.captured import CapturedStep, Part, by_prompt, coded_step
from distill_pipe.produce.engine import FinishedTrace
from distill_pipe.produce.head import HeadReducer, row_uniforms
from distill_pipe.store.hidden_codec import encode_hidden
from distill_pipe.store.sidecar import EncodedTrace
from distill_pipe.store.spec import CaptureSpec

VOCAB, HIDDEN, TOP_K, SAMPLES, LAYERS = 12, 3, 12, 2, (1, 4)
EXTRA = 3
CAPTURE = CaptureSpec(layers=LAYERS, hidden_codec="f32")


@dataclass(frozen=True)
class Fed:
    """What an engine computes for one prompt: every position, and `EXTRA` positions past the end."""

    done: FinishedTrace
    head: tuple[NDArray[Any], ...]
    hidden_TLH: NDArray[np.float32]

    def rows(self, first: int, stop: int, every_position: bool = False) -> StepRows:
        """Positions [first, stop) as a step delivers them: states of all, head rows where the next token is wanted."""
        mask = self.done.loss_mask + [True] * (EXTRA + 1)
        positions = np.array([p for p in range(first, stop) if every_position or mask[p + 1]], np.int64)
        step = CapturedStep([Part(self.done.ordinal, first, stop, positions)], [part[positions] for part in self.head],
                            [self.hidden_TLH[first:stop].transpose(1, 0, 2).copy()])
        [(_, rows)] = by_prompt(coded_step(step, CAPTURE.hidden_codec))
        return rows

    @property
    def length(self) -> int:
        return len(self.done.token_ids)


def make_sequence(ordinal: int, length: int = 9, given_text: bool = False, top_k: int = TOP_K) -> Fed:
    random = np.random.default_rng(ordinal)
    total = length + EXTRA
    logits_TV = torch.from_numpy(random.normal(0, 2, (total, VOCAB)).astype(np.float32))
    tokens = random.integers(0, VOCAB, total + 1)
    uniform_T = torch.from_numpy(row_uniforms(0, ordinal, np.arange(total)))
    capture = CaptureSpec(top_k=top_k, tail_samples=SAMPLES if top_k < VOCAB else 0)
    rows = HeadReducer(capture).rows(logits_TV, uniform_T, torch.from_numpy(tokens[1:]))
    reduced = [t.numpy() for t in rows.tensors()]
    prompt = length // 3 + 1
    mask = [False] * prompt + [True] * (length - prompt)
    if given_text:
        mask = [bool(b) for b in random.random(length) < 0.5]
        mask[0], mask[-1] = False, True
    sampled_T = np.full(total, -1) if given_text else tokens[1:].copy()
    done = FinishedTrace(ordinal, f"p{ordinal}", "domain", "given" if given_text else "stop",
                         tokens[:length].tolist(), mask)
    return Fed(done, (*reduced, sampled_T), random.normal(size=(total, 2, HIDDEN)).astype(np.float32))


def assemble(steps: Sequence[tuple[int, StepRows]], done: FinishedTrace,
             capture: CaptureSpec = CAPTURE) -> EncodedTrace:
    assembler = Assembler(capture)
    for ordinal, rows in steps:
        assembler.add(ordinal, rows)
    return assembler.finish(done)


def whole(sequence: Fed) -> EncodedTrace:
    return assemble([(sequence.done.ordinal, sequence.rows(0, sequence.length - 1))], sequence.done)


def assert_equal(a: EncodedTrace, b: EncodedTrace) -> None:
    np.testing.assert_equal(asdict(a), asdict(b))
    assert set(a.blobs) == set(a.errors) == set(LAYERS)


def test_a_trace_holds_the_rows_of_its_supervised_positions() -> None:
    sequence = make_sequence(3, given_text=True, top_k=4)
    encoded = whole(sequence)
    trace = encoded.trace
    positions_R = np.flatnonzero(sequence.done.loss_mask[1:])
    ids, logprobs, logsumexp, mass, tail_ids, _, next_logprob, _ = sequence.head
    assert trace.positions_R.tolist() == positions_R.tolist()
    assert trace.topk_ids_N.reshape(-1, 4).tolist() == ids[positions_R].tolist()
    assert trace.topk_logprobs_N.reshape(-1, 4).tolist() == logprobs[positions_R].tolist()
    assert trace.logsumexp_R.tolist() == logsumexp[positions_R].tolist()
    assert trace.tail_mass_R.tolist() == mass[positions_R].tolist()
    assert trace.tail_ids_N.reshape(-1, SAMPLES).tolist() == tail_ids[positions_R].tolist()
    assert trace.next_logprob_R.tolist() == next_logprob[positions_R].tolist()
    assert (trace.prompt_id, trace.domain, trace.finish_reason) == ("p3", "domain", "given")
    for i, layer in enumerate(LAYERS):
        exact_TH = torch.from_numpy(sequence.hidden_TLH[:sequence.length - 1, i])
        assert encoded.blobs[layer] == encode_hidden(exact_TH, "f32")
        # Positions 0, 1, 2 and 4, of 8.
        assert encoded.errors[layer].tolist() == [0.0] * 4


def test_rows_without_a_tail_store_no_samples() -> None:
    trace = whole(make_sequence(1, top_k=VOCAB)).trace
    assert trace.tail_counts_R.tolist() == [0] * trace.num_rows


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_split_into_steps_in_any_order_assembles_the_same_trace(data: st.DataObject) -> None:
    sequences = [make_sequence(o, data.draw(st.integers(3, 14)), data.draw(st.booleans()), data.draw(
        st.sampled_from([4, TOP_K]))) for o in range(data.draw(st.integers(1, 3)))]
    steps = []
    for sequence in sequences:
        stop = sequence.length - 1 + data.draw(st.integers(0, EXTRA))
        cuts = sorted(data.draw(st.sets(st.integers(1, stop - 1)))) if stop > 1 else []
        edges = [0, *cuts, stop]
        steps += [(sequence.done.ordinal, sequence.rows(a, b)) for a, b in pairwise(edges)]
    assembler = Assembler(CAPTURE)
    for ordinal, rows in data.draw(st.permutations(steps)):
        assembler.add(ordinal, rows)
    for sequence in data.draw(st.permutations(sequences)):
        assert_equal(assembler.finish(sequence.done), whole(sequence))


def test_head_and_hidden_rows_may_come_in_steps_of_their_own() -> None:
    sequence = make_sequence(2)
    all_rows = sequence.rows(0, sequence.length - 1)
    head, states = replace(all_rows, states=None), replace(all_rows, positions_n=np.empty(0, np.int64), head=())
    assert_equal(assemble([(2, head), (2, states)], sequence.done), whole(sequence))


def test_without_layers_no_states_are_needed_or_kept() -> None:
    sequence = make_sequence(2)
    rows = replace(sequence.rows(0, sequence.length - 1), states=None)
    assert assemble([(2, rows)], sequence.done, CaptureSpec()).blobs == {}


def steps_of(sequence: Fed) -> list[tuple[int, StepRows]]:
    return [(sequence.done.ordinal, sequence.rows(p, p + 1)) for p in range(sequence.length - 1)]


@pytest.mark.parametrize("given_text", [True, False])
def test_every_single_missing_step_is_refused(given_text: bool) -> None:
    sequence = make_sequence(5, given_text=given_text)
    for lost in range(sequence.length - 1):
        steps = steps_of(sequence)
        del steps[lost]
        with pytest.raises(CaptureError, match=rf"prompt 5: 1 of \d+ (head row|hidden state)s are missing.*{lost}"):
            assemble(steps, sequence.done)


def test_every_single_doubled_step_is_refused() -> None:
    sequence = make_sequence(5)
    for doubled in range(sequence.length - 1):
        steps = steps_of(sequence)
        with pytest.raises(CaptureError, match=r"prompt 5: 0 of \d+ (head row|hidden state)s are missing"):
            assemble([*steps, steps[doubled]], sequence.done)


def test_a_missing_row_is_not_made_up_for_by_a_doubled_one() -> None:
    sequence = make_sequence(5)
    steps = steps_of(sequence)
    steps[-1] = steps[-2]
    with pytest.raises(CaptureError, match=r"1 of .* missing"):
        assemble(steps, sequence.done)


def test_a_head_row_where_none_is_wanted_is_refused() -> None:
    sequence = make_sequence(5)
    with pytest.raises(CaptureError, match=r"0 of .* missing"):
        assemble([(5, sequence.rows(0, sequence.length - 1, every_position=True))], sequence.done)


def test_rows_of_another_prompt_do_not_count() -> None:
    sequence = make_sequence(5)
    with pytest.raises(CaptureError, match="prompt 5"):
        assemble([(6, rows) for _, rows in steps_of(sequence)], sequence.done)


@pytest.mark.parametrize("shift", [-1, 1])
def test_rows_shifted_by_one_are_refused_by_the_tokens_drawn_from_them(shift: int) -> None:
    for ordinal in range(20):
        sequence = make_sequence(ordinal, 12)
        shifted = replace(sequence, head=tuple(np.roll(part, shift, axis=0) for part in sequence.head))
        with pytest.raises(CaptureError, match=rf"prompt {ordinal}: the row at position \d+ is not the distribution"):
            whole(shifted)


def test_tokens_shifted_by_one_are_refused_too() -> None:
    sequence = make_sequence(4, 12)
    tokens = sequence.done.token_ids
    moved = msgspec.structs.replace(sequence.done, token_ids=[*tokens[1:], tokens[0]])
    with pytest.raises(CaptureError, match="is not the distribution"):
        whole(replace(sequence, done=moved))


@pytest.mark.parametrize("first", [True, False])
def test_of_a_row_that_was_sampled_twice_the_copy_counts_whose_token_stayed(first: bool) -> None:
    sequence = make_sequence(5)
    thrown_away = sequence.rows(4, 5)
    *fields, sampled = thrown_away.head
    thrown_away = replace(thrown_away, states=None, head=(*(f + 1 for f in fields), (sampled + 1) % VOCAB))
    steps = steps_of(sequence)
    steps.insert(0 if first else len(steps), (5, thrown_away))
    assert_equal(assemble(steps, sequence.done), whole(sequence))


def test_of_two_copies_with_the_same_token_one_is_kept() -> None:
    sequence = make_sequence(5)
    again = replace(sequence.rows(4, 5), states=None)
    assert_equal(assemble([*steps_of(sequence), (5, again)], sequence.done), whole(sequence))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("field", [1, 2, 3])
def test_a_value_that_is_not_finite_is_refused_as_such(field: int, value: float) -> None:
    sequence = make_sequence(8, given_text=True)
    row = int(np.flatnonzero(sequence.done.loss_mask[1:])[0])
    sequence.head[field][row, ...] = value
    with pytest.raises((NotFiniteError, CaptureError)) as caught:
        whole(sequence)
    assert isinstance(caught.value, NotFiniteError) or value == np.inf


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_state_that_is_not_finite_is_refused_with_layer_and_position(value: float) -> None:
    sequence = make_sequence(8)
    sequence.hidden_TLH[4, 1, 2] = value
    with pytest.raises(NotFiniteError, match="prompt 8: layer 4 is not finite at 1 positions, the first at position 4"):
        whole(sequence)


def test_what_is_not_finite_past_the_end_does_not_matter() -> None:
    sequence = make_sequence(8)
    wanted = whole(sequence)
    sequence.hidden_TLH[sequence.length - 1:] = np.nan
    assert_equal(assemble([(8, sequence.rows(0, sequence.length + 2))], sequence.done), wanted)


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_prompt_that_ended_without_a_supervised_token_is_refused(tokens: int) -> None:
    done = FinishedTrace(9, "p9", None, "abort", list(range(tokens)), [False] * tokens)
    for steps in ([], [(9, make_sequence(9).rows(0, 2))]):
        with pytest.raises(CaptureError, match="prompt 9"):
            assemble(steps, done)


def test_a_dropped_prompt_is_forgotten() -> None:
    sequence = make_sequence(5)
    assembler = Assembler(CAPTURE)
    assembler.add(5, sequence.rows(0, 4))
    assembler.drop(5)
    assembler.add(5, sequence.rows(0, sequence.length - 1))
    assert_equal(assembler.finish(sequence.done), whole(sequence))
    with pytest.raises(CaptureError):
        assembler.finish(sequence.done)
