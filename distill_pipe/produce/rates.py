"""Bytes of a run from its tokens and rows: a rate for each column, and what the whole adds up to.

The rates here were measured on SmolLM2-135M over chat, code and given responses; `probe` measures those of another
target. The trade-off: without a probe they are a guess that is good for targets of a like vocabulary and entropy.

Units of a rate: a trace, a token, a supervised row, or a position (a token with hidden states, so all but the last).
"""

from dataclasses import dataclass
from math import log2
from typing import Final, get_args

import numpy as np
from msgspec import Struct

from distill_pipe.errors import StorageFullError
from distill_pipe.produce.sample import Sample, Totals
from distill_pipe.store.codec import has_scale, scalar_bits
from distill_pipe.store.shard import MAIN_SCHEMA
from distill_pipe.store.sidecar import layer_column
from distill_pipe.store.spec import HiddenCodec, RunSpec

MARGIN: Final = 1.05
CODECS: Final[tuple[HiddenCodec, ...]] = get_args(HiddenCodec)
UNITS = {"ordinal": "trace", "prompt_id": "trace", "domain": "trace", "finish_reason": "trace", "token_ids": "token",
          "loss_mask": "token"}
# Bytes after zstd, measured on 96 traces each of chat, code and question-answer pairs, at 7 and 24 significant bits.
_TRACE_BYTES = {"ordinal": 2.0, "domain": 1.2, "finish_reason": 1.7}
# A token of a text, and an id of a head or a tail, in shares of log2(vocabulary): likelier tokens repeat.
_TOKEN_SHARE, _HEAD_SHARE, _TAIL_SHARE = 0.63, 0.86, 0.92
# What a number takes beside its significant bits: sign, exponent, and what zstd wins, which is most in a sorted head.
_EXTRA_BITS = {"topk_logprobs": -1.6, "tail_logprobs": 1.1, "logsumexp": 2.0, "tail_mass": 4.7, "next_logprob": 4.6}
_SCALARS = ("logsumexp", "tail_mass", "next_logprob")
# States in shares of bf16, of fresh positions: zstd drops a prefix (a system prompt) that the trace before has too, as
# long as that trace is within its reach. The shares then agree to 4 % between chat, code and given responses.
_HIDDEN_SHARE: Final[dict[HiddenCodec, float]] = {
    "f32": 1.94, "bf16": 0.82, "bf16-split": 0.73, "fp8": 0.436, "q8": 0.47, "q6": 0.335, "q5": 0.26}
# Float32 states of a bf16 engine have two bytes that are zero.
_F32_OF_BF16 = 0.95
_MAIN_FOOTER, _COLUMN_FOOTER, _FRAGMENT, _TABLE_PER_ROW, _TABLE_PER_TOKEN = 8100, 350, 2500, 15, 5
# Head entries, at most 256, that hold a share of the probability: the mean of chat and code, which differ fourfold.
_COVERAGE, _ENTRIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99), (4.0, 23.0, 48.0, 73.0, 101.0, 121.0)


class Rate(Struct, frozen=True, kw_only=True):
    """A column: bytes per unit, what the unit is, and bytes of the whole run."""

    column: str
    per: str
    rate: float
    bytes: int


class CodecBytes(Struct, frozen=True, kw_only=True):
    """The run with hidden states in one codec, or `none`: bytes of the states, and of the dataset with them."""

    codec: str
    hidden: int
    total: int


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per unit of every column of the main shards; per fresh position of every layer, by codec; per shard of what
    files hold beside columns; and per row of the records (a shard's token table grows with its rows)."""

    columns: dict[str, float]
    hidden: dict[HiddenCodec, dict[int, float]]
    footer: float
    record: float


@dataclass(frozen=True, slots=True)
class Cost:
    """A whole run in bytes. `data` is columns, hidden states and footers."""

    columns: tuple[Rate, ...]
    layers: tuple[Rate, ...]
    codecs: tuple[CodecBytes, ...]
    footers: int
    plan: int
    records: int
    data: int

    @property
    def disk(self) -> int:
        return self.data + self.plan + self.records


def usual_rates(spec: RunSpec, sample: Sample, totals: Totals) -> Rates:
    """Rates by the constants above."""
    capture, size = spec.capture, spec.target.hidden_size
    share = _HIDDEN_SHARE | ({"f32": _F32_OF_BF16} if spec.target.dtype == "bfloat16" else {})
    sidecar_columns = 1 + len(capture.layers) * (1 + has_scale(capture.hidden_codec)) if capture.layers else 0
    return Rates(_usual_columns(spec, sample),
                 {codec: dict.fromkeys(capture.layers, share[codec] * 2 * size) for codec in CODECS},
                 _MAIN_FOOTER + _COLUMN_FOOTER * sidecar_columns,
                 _TABLE_PER_ROW + _FRAGMENT * totals.shards / totals.row)


def _usual_columns(spec: RunSpec, sample: Sample) -> dict[str, float]:
    capture, id_bytes = spec.capture, log2(spec.target.vocab_size) / 8
    head, tail = float(capture.top_k), capture.tail_samples
    if capture.coverage is not None:
        head = min(head, float(np.interp(capture.coverage, _COVERAGE, _ENTRIES)))
    rates = _TRACE_BYTES | {"prompt_id": 1 + sum(len(p.prompt_id) for p in sample.prompts) / len(sample.prompts) / 2,
                            "token_ids": _TOKEN_SHARE * id_bytes, "loss_mask": 0.04,
                            "topk_counts": 0.03 if capture.coverage is None else 1.0, "tail_counts": 0.03,
                            "topk_ids": head * _HEAD_SHARE * id_bytes, "tail_ids": tail * _TAIL_SHARE * id_bytes}
    for name, extra in _EXTRA_BITS.items():
        bits = scalar_bits(capture.logprob_bits) if name in _SCALARS else capture.logprob_bits
        rates[name] = {"topk_logprobs": head, "tail_logprobs": tail}.get(name, 1.0) * min((bits + extra) / 8, 4.0)
    return {name: rates[name] for name in MAIN_SCHEMA.names}


def cost_of(rates: Rates, totals: Totals, spec: RunSpec, plan: int) -> Cost:
    """Rates times units."""
    columns = tuple(_rate(name, UNITS.get(name, "row"), rate, totals) for name, rate in rates.columns.items())
    footers, largest = round(rates.footer * totals.shards), _FRAGMENT + _TABLE_PER_TOKEN * spec.target.vocab_size
    records = min(round(rates.record * totals.row), largest * totals.shards)
    main = sum(c.bytes for c in columns) + footers
    share = totals.fresh / totals.position if totals.position else 0.0
    states = {codec: tuple(_rate(layer_column(n), "position", rate * share, totals) for n, rate in layers.items())
              for codec, layers in rates.hidden.items()}
    hidden = {"none": 0} | {codec: sum(layer.bytes for layer in layers) for codec, layers in states.items()}
    codecs = tuple(CodecBytes(codec=codec, hidden=size, total=main + size + plan + records)
                   for codec, size in hidden.items())
    chosen = spec.capture.hidden_codec
    return Cost(columns, states[chosen], codecs, footers, plan, records, main + hidden[chosen])


def _rate(column: str, per: str, rate: float, totals: Totals) -> Rate:
    return Rate(column=column, per=per, rate=rate, bytes=round(rate * getattr(totals, per)))


def require_room(cost: Cost, spec: RunSpec, share: float, free: int, out: str) -> None:
    """Hold the share of the run that is not made yet against the disk.

    Raises:
        StorageFullError: with both figures, and what would help.
    """
    if cost.disk * share * MARGIN <= free:
        return
    fitting = [c for c in cost.codecs if c.hidden > 0 and c.total * share * MARGIN <= free]
    other = max(fitting, key=lambda c: c.hidden) if fitting else min(cost.codecs[1:], key=lambda c: c.hidden)
    fix = "free some room or take fewer prompts"
    if spec.capture.layers:
        fix = (f"with --hidden-codec {other.codec} it is {other.total * share / 1e9:,.3f} GB"
               f"{'' if fitting else ' (too much as well)'}, each layer less saves "
               f"{(cost.disk - cost.codecs[0].total) * share / len(spec.capture.layers) / 1e9:,.3f} GB, without "
               f"hidden states it is {cost.codecs[0].total * share / 1e9:,.3f} GB")
    raise StorageFullError(f"{out}: about {cost.disk * share / 1e9:,.3f} GB will be written (and 5 % kept in reserve), "
                           f"the disk has {free / 1e9:,.3f} GB free; {fix}")
