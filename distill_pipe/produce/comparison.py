"""What an audit measures: differences between stored and replayed, and how they add up over traces.

What the format is known to do is told apart from the rest: of a number, half a unit of its last stored bit; of a state,
the codec's own error as it was measured while writing. The trade-off: an error smaller than a stored bit stays unseen
in head and tail, and is seen in the next token's log-probability, which is stored with eight bits more.

Shapes: T tokens, R rows, N flat entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor

from distill_pipe.produce.replay import Doubles, Replayed, row_sums
from distill_pipe.store.codec import scalar_bits, scaled_head
from distill_pipe.store.hidden_codec import relative_errors
from distill_pipe.store.manifest import Fragment
from distill_pipe.store.trace import Trace

_SCALARS: Final = ("next_logprob_R", "logsumexp_R", "tail_mass_R")
_NUMBERS: Final = ("topk_logprobs_N", "tail_logprobs_N", *_SCALARS)


class NumberError(Struct, frozen=True, kw_only=True):
    """|stored - replayed| of a column: mean and largest; `rounding` is the mean of what rounding may add at most, and
    `beyond_mean` and `beyond_max` are of what is left of each difference without it."""

    column: str
    entries: int
    mean: float
    max: float
    rounding: float
    beyond_mean: float
    beyond_max: float


class LayerError(Struct, frozen=True, kw_only=True):
    """Relative error of a layer's decoded states, beside the codec's own as recorded in the shards that were read."""

    layer: int
    positions: int
    mean: float
    max: float
    codec_mean: float
    codec_max: float


class AuditReport(Struct, frozen=True, kw_only=True):
    """What an audit found. `top1_ties` are rows on which stored and replayed top-1 differ while the replay's two logits
    are closer than noise; they do not count as agreement. `alpha_drift_*` is 1 - alpha between a stored row, read as
    the losses read it, and the replayed distribution. `nonfinite_*` count values: of stored rows (such traces are not
    replayed), of stored states, and of differences. `revision_checked` is false where a hub commit and a local folder
    cannot be compared. `exceeded` says what lies beyond the limits."""

    root: str
    target: str
    revision_checked: bool
    engine_dtype: str
    dtype: str
    device: str
    ordinals: tuple[int, ...]
    rows: int
    numbers: tuple[NumberError, ...]
    layers: tuple[LayerError, ...]
    top1_agreement: float
    top1_ties: float
    alpha_drift_mean: float
    alpha_drift_max: float
    nonfinite_rows: int
    nonfinite_states: int
    nonfinite_differences: int
    max_logprob_error: float
    max_hidden_error: float
    exceeded: tuple[str, ...]


def alpha_drift(trace: Trace, replayed: Replayed) -> Doubles:
    """1 - sum_x min(stored, replayed) of each row, from its scaled head and sampled tail as the losses estimate it, so
    a row may lie a little below 0. A row without samples counts the tail as one token."""
    head_N = scaled_head(trace.topk_logprobs_N, trace.topk_counts_R, trace.tail_mass_R)
    shared_R = row_sums(np.exp(np.minimum(head_N, replayed.topk_logprobs_N)), trace.topk_counts_R)
    accepted_N = np.exp(np.minimum(replayed.tail_logprobs_N - trace.tail_logprobs_N, 0))
    samples_R = trace.tail_counts_R
    sampled_R = trace.tail_mass_R * row_sums(accepted_N, samples_R) / np.maximum(samples_R, 1)
    drift_R: Doubles = 1 - shared_R - np.where(samples_R > 0, sampled_R,
                                               np.minimum(trace.tail_mass_R, replayed.tail_mass_R))
    return drift_R


@dataclass(slots=True)
class Tally:
    """Mean and largest of values that come in pieces; those that are not finite are only counted."""

    count: int = 0
    total: float = 0.0
    largest: float = -np.inf
    nonfinite: int = 0

    def add(self, values: NDArray[np.floating]) -> None:
        finite = values[np.isfinite(values)]
        self.count += len(finite)
        self.total += float(finite.sum(dtype=np.float64))
        self.largest = max(self.largest, float(finite.max(initial=-np.inf)))
        self.nonfinite += len(values) - len(finite)

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)

    @property
    def max(self) -> float:
        return self.largest if self.count else 0.0


@dataclass(slots=True)
class _NumberTallies:
    error: Tally = field(default_factory=Tally)
    rounding: Tally = field(default_factory=Tally)
    beyond: Tally = field(default_factory=Tally)


@dataclass(slots=True)
class Comparison:
    """What the traces compared so far add up to. `tie`: two logits of the replay that are closer may swap places."""

    logprob_bits: int
    tie: float
    ordinals: list[int] = field(default_factory=list)
    numbers: dict[str, _NumberTallies] = field(default_factory=lambda: {name: _NumberTallies() for name in _NUMBERS})
    states: dict[int, Tally] = field(default_factory=dict)
    drift: Tally = field(default_factory=Tally)
    agreed: int = 0
    ties: int = 0
    nonfinite_rows: int = 0
    nonfinite_states: int = 0

    def add_rows(self, trace: Trace, replayed: Replayed) -> None:
        """Compare the rows of a trace."""
        self.ordinals.append(trace.ordinal)
        for name, tallies in self.numbers.items():
            bits = scalar_bits(self.logprob_bits) if name in _SCALARS else self.logprob_bits
            stored = getattr(trace, name).astype(np.float64)
            error, rounding = np.abs(stored - getattr(replayed, name)), half_unit(stored, bits)
            tallies.error.add(error)
            tallies.rounding.add(rounding)
            tallies.beyond.add(np.maximum(error - rounding, 0))
        self.drift.add(alpha_drift(trace, replayed))
        self.agreed += int((replayed.top1_gap_R == 0).sum())
        self.ties += int(((replayed.top1_gap_R > 0) & (replayed.top1_gap_R <= self.tie)).sum())

    def add_states(self, layer: int, stored_TH: Tensor, replayed_TH: Tensor) -> None:
        """Compare the states of one layer of a trace."""
        finite_TH = stored_TH.isfinite()
        self.nonfinite_states += int((~finite_TH).sum())
        whole_T = finite_TH.all(1)
        errors_T = relative_errors(replayed_TH[whole_T], stored_TH[whole_T])
        self.states.setdefault(layer, Tally()).add(errors_T.numpy())

    @property
    def rows(self) -> int:
        return self.numbers["logsumexp_R"].error.count + self.numbers["logsumexp_R"].error.nonfinite

    @property
    def nonfinite_differences(self) -> int:
        tallies = [*(t.error for t in self.numbers.values()), *self.states.values(), self.drift]
        return sum(t.nonfinite for t in tallies)


def numbers(compared: Comparison) -> tuple[NumberError, ...]:
    """Every column's differences."""
    return tuple(NumberError(column=name.rpartition("_")[0], entries=t.error.count, mean=t.error.mean, max=t.error.max,
                             rounding=t.rounding.mean, beyond_mean=t.beyond.mean, beyond_max=t.beyond.max)
                 for name, t in compared.numbers.items())


def layers(compared: Comparison, fragments: Sequence[Fragment]) -> tuple[LayerError, ...]:
    """Every layer's errors, beside those that the shards' records give its codec."""
    codec = {n: [e for f in fragments for e in f.info.measured.hidden if e.layer == n] for n in compared.states}
    return tuple(LayerError(layer=n, positions=tally.count, mean=tally.mean, max=tally.max,
                            codec_mean=sum(e.mean * e.rows for e in codec[n]) / max(sum(e.rows for e in codec[n]), 1),
                            codec_max=max((e.max for e in codec[n]), default=0.0))
                 for n, tally in compared.states.items())


def exceeded(compared: Comparison, numbers: Sequence[NumberError], layers: Sequence[LayerError],
             limits: Sequence[float]) -> tuple[str, ...]:
    """What lies beyond the limits, one line each."""
    found = [f"{e.column} is off by {e.beyond_mean:.3g} beyond rounding (limit {limits[0]:.3g})"
             for e in numbers if not e.beyond_mean <= limits[0]]
    found += [f"layer {e.layer} is off by {e.mean:.2%}, of which {e.codec_mean:.2%} by its codec (limit "
              f"{limits[1]:.2%} beyond it)" for e in layers if not e.mean - e.codec_mean <= limits[1]]
    counts = {"values of rows": compared.nonfinite_rows, "values of states": compared.nonfinite_states,
              "differences": compared.nonfinite_differences}
    return (*found, *(f"{count} {what} are not finite" for what, count in counts.items() if count))


def half_unit(stored: Doubles, bits: int) -> Doubles:
    """The most by which a number differs from what was rounded to it, to `bits` significant bits."""
    half: Doubles = np.ldexp(0.5, np.frexp(stored)[1] - bits)
    return half
