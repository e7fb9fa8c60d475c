"""Catches a trace that breaks an invariant and is accepted, or is refused without saying which prompt and what."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_datasets import Shape, random_trace

from distill_pipe.errors import CaptureError, NotFiniteError
from distill_pipe.store.trace import Trace

ORDINAL = 41


def bf16_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


def fields(seed: int = 0) -> dict[str, Any]:
    """The fields of a valid trace, as copies that a test may spoil."""
    trace = random_trace(ORDINAL, Shape(), seed)
    made = {name: getattr(trace, name) for name in Trace.__dataclass_fields__}
    copied = {n: v.copy() if isinstance(v, np.ndarray) else v for n, v in made.items()}
    return copied | {"hidden": {n: h.copy() for n, h in trace.hidden.items()}}


def refused(kind: type[Exception], text: str, **changed: object) -> None:
    with pytest.raises(kind, match=rf"prompt {ORDINAL}: .*{text}"):
        Trace(**(fields() | changed))


def test_a_valid_trace_knows_its_sizes_and_positions() -> None:
    made = fields()
    made["loss_mask_T"][:] = False
    made["loss_mask_T"][[2, 4]] = True
    per_row = ("logsumexp_R", "tail_mass_R", "next_logprob_R", "topk_counts_R", "tail_counts_R")
    flat = {"topk": int(made["topk_counts_R"][:2].sum()), "tail": int(made["tail_counts_R"][:2].sum())}
    made |= {name: made[name][:2] for name in per_row}
    made |= {name: made[name][:n] for part, n in flat.items() for name in (f"{part}_ids_N", f"{part}_logprobs_N")}
    trace = Trace(**made)
    assert trace.positions_R.tolist() == [1, 3]
    assert (trace.num_rows, trace.num_tokens) == (2, len(made["token_ids_T"]))


@pytest.mark.parametrize("name", ["loss_mask_T", "logsumexp_R", "tail_mass_R", "next_logprob_R", "topk_counts_R",
                                  "tail_counts_R", "topk_ids_N", "topk_logprobs_N", "tail_ids_N", "tail_logprobs_N"])
def test_an_array_that_is_one_entry_short_or_long_is_refused(name: str) -> None:
    values = fields()[name]
    for wrong in (values[:-1], np.append(values, values[-1])):
        refused(CaptureError, "entries, expected", **{name: wrong})


def test_hidden_states_must_cover_every_position_but_the_last() -> None:
    hidden = fields()["hidden"]
    tokens = len(fields()["token_ids_T"])
    less = hidden[2][:-1]
    refused(CaptureError, f"layer 2 has {tokens - 2} entries, expected {tokens - 1}", hidden=hidden | {2: less})
    more = np.concatenate([hidden[4], hidden[4][:1]])
    refused(CaptureError, f"layer 4 has {tokens} entries, expected {tokens - 1}", hidden=hidden | {4: more})


def test_a_trace_without_a_supervised_token_is_refused() -> None:
    made = fields()
    empty = {n: v[:0] for n, v in made.items() if n.endswith(("_R", "_N"))}
    for mask in (False, np.arange(len(made["loss_mask_T"])) == 0):
        refused(CaptureError, "no token is supervised", **empty, loss_mask_T=np.zeros_like(made["loss_mask_T"]) | mask)


def test_a_supervised_first_token_is_refused_because_nothing_predicts_it() -> None:
    mask_T = fields()["loss_mask_T"]
    mask_T[0] = True
    refused(CaptureError, "token 0 is marked as supervised", loss_mask_T=mask_T)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["logsumexp_R", "tail_mass_R", "next_logprob_R", "topk_logprobs_N", "tail_logprobs_N"])
def test_a_value_that_is_not_finite_is_refused_with_its_place(name: str, value: float) -> None:
    values = fields()[name]
    values[1] = value
    refused(NotFiniteError, f"1 values of {name} are not finite, the first at entry 1", **{name: values})


@pytest.mark.parametrize("value", [-1e-6, 1.0001])
def test_a_tail_mass_that_is_no_probability_is_refused(value: float) -> None:
    mass_R = fields()["tail_mass_R"]
    mass_R[-1] = value
    refused(CaptureError, r"a tail mass lies outside \[0, 1\]", tail_mass_R=mass_R)


def test_tail_masses_of_exactly_zero_and_one_are_accepted() -> None:
    mass_R = fields()["tail_mass_R"]
    mass_R[0], mass_R[1] = 0, 1
    assert Trace(**(fields() | {"tail_mass_R": mass_R})).num_rows == len(mass_R)


def test_a_row_without_a_head_is_refused() -> None:
    counts_R = fields()["topk_counts_R"]
    counts_R[0], counts_R[1] = 0, counts_R[0] + counts_R[1]
    refused(CaptureError, "a row has no head entry", topk_counts_R=counts_R)


def test_a_negative_number_of_tail_samples_is_refused() -> None:
    counts_R = fields()["tail_counts_R"]
    counts_R[1], counts_R[0] = -1, counts_R[0] + counts_R[1] + 1
    refused(CaptureError, "negative number of tail samples", tail_counts_R=counts_R)


def test_a_head_that_rises_within_a_row_is_refused_and_one_that_rises_between_rows_is_not() -> None:
    made = fields()
    logprobs_N, first = made["topk_logprobs_N"], int(made["topk_counts_R"][0])
    logprobs_N[first - 1] = logprobs_N[first] - 5
    assert Trace(**made).num_rows > 1
    logprobs_N[first + 1] = logprobs_N[first] + 0.01
    refused(CaptureError, "not in descending order", topk_logprobs_N=logprobs_N)


def test_equal_neighbours_in_the_head_are_accepted() -> None:
    made = fields()
    made["topk_logprobs_N"][1] = made["topk_logprobs_N"][0]
    assert Trace(**made).num_rows


@pytest.mark.parametrize("name", ["topk_ids_N", "tail_ids_N", "token_ids_T"])
def test_a_negative_token_id_is_refused(name: str) -> None:
    ids = fields()[name]
    ids[-1] = -1
    refused(CaptureError, "a token id is negative", **{name: ids})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_hidden_state_that_is_not_finite_is_refused_with_layer_and_position(value: float) -> None:
    hidden = fields()["hidden"]
    hidden[2][3, 5] = hidden[2][1, 0] = value
    refused(NotFiniteError, "layer 2 is not finite at 2 positions, the first at position 1", hidden=hidden)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFF81])
def test_bfloat16_bits_of_infinity_and_nan_are_refused_with_layer_and_position(bits: int) -> None:
    hidden = {n: bf16_bits(h) for n, h in fields()["hidden"].items()}
    assert Trace(**(fields() | {"hidden": hidden})).hidden[4].dtype == np.uint16
    hidden[4][2, 0] = bits
    refused(NotFiniteError, "layer 4 is not finite at 1 positions, the first at position 2", hidden=hidden)


def test_the_largest_finite_bfloat16_is_accepted() -> None:
    hidden = {n: bf16_bits(h) for n, h in fields()["hidden"].items()}
    hidden[1][0, 0], hidden[1][0, 1] = 0x7F7F, 0xFF7F
    assert Trace(**(fields() | {"hidden": hidden})).num_rows
