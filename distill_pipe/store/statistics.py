"""What the rows and tokens of a dataset look like, in numbers small enough to keep beside every shard.

Two things are counted while a shard is written and added up by `finalize`: histograms of its rows and traces, which
are part of the shard's record, and a table of its tokens, from which a draft's vocabulary is chosen. Both are sums, so
a dataset's are those of its shards added together and no shard is read twice. The trade-off is fixed bins: they answer
"how uncertain is the target" without a row being read, and cannot be made finer later.

Count traces as they are stored, after rounding: only then can the numbers be made again from the main shard.

Shapes: R supervised rows, N flat entries of all rows of all traces, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import pyarrow as pa
from msgspec import Meta, Struct
from numpy.typing import NDArray

from distill_pipe.errors import CaptureError, MismatchError
from distill_pipe.store.codec import scaled_head
from distill_pipe.store.parquet_writer import write_table
from distill_pipe.store.trace import Trace

TOKEN_SCHEMA: Final = pa.schema([("token_id", pa.int32()), ("count", pa.int64()), ("mass", pa.float64())])
DRAFT_SIZES: Final = (8192, 16384, 32768, 65536)


class Histogram(Struct, frozen=True, kw_only=True):
    """How many values fell into each of `bins` bins of equal width on a scale.

    With g = the identity (`linear`), log2 or log10, bin i holds the values x with `first + i * step <= g(x) < first +
    (i + 1) * step`. Bin 0 also holds everything below, and bin `bins - 1` everything above. `counts` ends with the last
    bin that holds something: bins that are not written are empty.
    """

    scale: Literal["linear", "log2", "log10"]
    first: float
    step: Annotated[float, Meta(gt=0)]
    bins: Annotated[int, Meta(ge=1)]
    counts: tuple[Annotated[int, Meta(ge=0)], ...] = ()

    @property
    def total(self) -> int:
        """How many values were counted."""
        return sum(self.counts)

    @property
    def edges(self) -> NDArray[np.float64]:
        """The `bins - 1` values that part the bins; each belongs to the bin above it."""
        marks: NDArray[np.float64] = self.first + self.step * np.arange(1, self.bins, dtype=np.float64)
        return marks if self.scale == "linear" else np.power({"log2": 2.0, "log10": 10.0}[self.scale], marks)

    def of(self, values: NDArray[Any]) -> "Histogram":
        """A histogram with the same bins, of `values`."""
        counts = np.bincount(np.searchsorted(self.edges, values, side="right"))
        return self._with(counts.tolist())

    def __add__(self, other: "Histogram") -> "Histogram":
        """The histogram of both together.

        Raises:
            MismatchError: they have different bins.
        """
        if self._with(()) != other._with(()):
            raise MismatchError(f"histograms with different bins cannot be added: {self._with(())}, {other._with(())}")
        return self._with([a + b for a, b in zip_longest(self.counts, other.counts, fillvalue=0)])

    def _with(self, counts: Sequence[int]) -> "Histogram":
        last = max((i + 1 for i, count in enumerate(counts) if count), default=0)
        return Histogram(scale=self.scale, first=self.first, step=self.step, bins=self.bins,
                         counts=tuple(counts[:last]))


# Quarter nats up to 14, which is the entropy of a uniform choice from 1.2 million tokens.
_ENTROPY: Final = Histogram(scale="linear", first=0.0, step=0.25, bins=56)
_TAIL_MASS: Final = Histogram(scale="log10", first=-6.0, step=0.25, bins=25)
_TOP_K: Final = Histogram(scale="log2", first=0.0, step=0.5, bins=32)
_TOKENS: Final = Histogram(scale="log2", first=0.0, step=1.0, bins=24)


class ShardStatistics(Struct, frozen=True, kw_only=True):
    """Histograms of rows and traces.

    `entropy`: nats, of the row's target distribution; see `row_entropy`. Bins of 0.25 from 0 to 14.
    `tail_mass`: probability outside the row's head. Four bins to the decade from 1e-6 to 1; a row without a tail is in
    bin 0, and the last bin holds rows that are all tail.
    `top_k`: head entries of the row. Two bins to the octave from 1 to 65536; every power of two opens a bin.
    `tokens`: length of the trace, prompt and response. Bin i holds lengths from 2^i to 2^(i+1) - 1.
    """

    entropy: Histogram = _ENTROPY
    tail_mass: Histogram = _TAIL_MASS
    top_k: Histogram = _TOP_K
    tokens: Histogram = _TOKENS


class VocabularyCoverage(Struct, frozen=True, kw_only=True):
    """What the `size` likeliest tokens cover: the share of supervised tokens among them, and their mean probability per
    row, which is the highest mean acceptance rate that a draft with this vocabulary can reach.

    Tail mass of rows without tail samples belongs to no known token and counts as outside: there `mass` is too low.
    The tokens were chosen on the rows that they are held against, so other text of the kind is covered a little less.
    """

    size: int
    tokens: float
    mass: float


def shard_statistics(traces: Sequence[Trace]) -> ShardStatistics:
    """The histograms of some traces."""
    return ShardStatistics(
        entropy=_ENTROPY.of(row_entropy(traces)),
        tail_mass=_TAIL_MASS.of(_flat(traces, "tail_mass_R")),
        top_k=_TOP_K.of(_flat(traces, "topk_counts_R")),
        tokens=_TOKENS.of(np.array([t.num_tokens for t in traces], np.int64)))


def merge(parts: Iterable[ShardStatistics]) -> ShardStatistics:
    """The statistics of all parts together; of none, empty histograms.

    Raises:
        MismatchError: they have different bins.
    """
    whole = ShardStatistics()
    for part in parts:
        whole = ShardStatistics(entropy=whole.entropy + part.entropy, tail_mass=whole.tail_mass + part.tail_mass,
                                top_k=whole.top_k + part.top_k, tokens=whole.tokens + part.tokens)
    return whole


def row_entropy(traces: Sequence[Trace]) -> NDArray[np.float64]:
    """The entropy of each row's target distribution in nats, `[R]`.

    The head's part is exact. The tail's, `-sum over the tail of p log p`, is estimated from the tail samples, each of
    weight `tail_mass / tail_counts`, without bias. A row that has tail mass and no samples gets `tail_mass * -log p_K`,
    p_K being its smallest head entry: no tail token is likelier than that, so this is a lower bound.
    """
    topk_N, topk_counts_R = _flat(traces, "topk_logprobs_N"), _flat(traces, "topk_counts_R").astype(np.int64)
    tail_counts_R = _flat(traces, "tail_counts_R").astype(np.int64)
    head_R = -_row_sums(np.exp(topk_N) * topk_N, topk_counts_R)
    smallest_R = topk_N[np.cumsum(topk_counts_R) - 1]
    mean_R = _row_sums(_flat(traces, "tail_logprobs_N"), tail_counts_R) / np.maximum(tail_counts_R, 1)
    entropy_R: NDArray[np.float64] = head_R - _flat(traces, "tail_mass_R") * np.where(tail_counts_R > 0, mean_R,
                                                                                      smallest_R)
    return entropy_R


def token_table(traces: Sequence[Trace], vocab_size: int) -> pa.Table:
    """The tokens that occur in some traces, by rising `token_id`.

    `count` is how often a token is the supervised next token. `mass` is its probability summed over the rows: that of
    its head entries, scaled as a reader scales them, and for each tail sample of it the sample's weight. Over all
    tokens, mass adds up to the number of rows, less the tail mass of rows without samples. It is rounded to float32 and
    kept as float64, so that sums of it are not.

    Raises:
        CaptureError: a token id lies outside the vocabulary.
    """
    topk_counts_R, tail_counts_R = (_flat(traces, f"{part}_counts_R").astype(np.int64) for part in ("topk", "tail"))
    tail_mass_R = _flat(traces, "tail_mass_R")
    mass_N = np.concatenate([np.exp(scaled_head(_flat(traces, "topk_logprobs_N"), topk_counts_R, tail_mass_R)),
                             np.repeat(tail_mass_R / np.maximum(tail_counts_R, 1), tail_counts_R)])
    ids_N = np.concatenate([_ids(traces, "topk_ids_N", vocab_size), _ids(traces, "tail_ids_N", vocab_size)])
    # The mask marks the tokens that some row is the distribution of, so these are the rows' next tokens in order.
    next_R = _ids(traces, "token_ids_T", vocab_size)[_flat(traces, "loss_mask_T").astype(np.bool_)]
    mass_V = np.bincount(ids_N, mass_N, vocab_size).astype(np.float32).astype(np.float64)
    return _table(np.bincount(next_R, minlength=vocab_size), mass_V)


def merge_token_tables(tables: Iterable[pa.Table], vocab_size: int) -> pa.Table:
    """The table of all tables' traces together; holds one of them at a time.

    Raises:
        MismatchError: a token id lies outside the vocabulary.
    """
    count_V, mass_V = np.zeros(vocab_size, np.int64), np.zeros(vocab_size)
    for table in tables:
        ids_N = table["token_id"].to_numpy()
        if len(ids_N) and not 0 <= ids_N.min() <= ids_N.max() < vocab_size:
            raise MismatchError(f"a token table holds ids outside the vocabulary of {vocab_size} tokens")
        np.add.at(count_V, ids_N, table["count"].to_numpy())
        np.add.at(mass_V, ids_N, table["mass"].to_numpy())
    return _table(count_V, mass_V)


def write_token_table(path: Path, table: pa.Table) -> None:
    """Write a token table as Parquet; about 4 bytes per token."""
    write_table(path, table)


def token_table_name(fragment: str) -> str:
    """Where the token table of a shard lies, beside its fragment. It can be made again from the main shard."""
    return f"{fragment.removesuffix('.json')}.tokens.parquet"


def coverage(table: pa.Table, rows: int, sizes: Sequence[int] = DRAFT_SIZES) -> tuple[VocabularyCoverage, ...]:
    """What the draft vocabularies of some sizes cover of the `rows` rows behind a token table; see `draft_vocabulary`.
    A size beyond the tokens that occur covers what all of them do."""
    order_N = _by_mass(table)
    count_N = np.concatenate([[0], np.cumsum(table["count"].to_numpy()[order_N])])
    mass_N = np.concatenate([[0.0], np.cumsum(table["mass"].to_numpy()[order_N])])
    held = [min(size, len(order_N)) for size in sizes]
    # Rounding may carry a sum of probabilities just past the number of rows.
    return tuple(VocabularyCoverage(size=size, tokens=float(count_N[n]) / max(rows, 1),
                                    mass=min(float(mass_N[n]) / max(rows, 1), 1.0))
                 for size, n in zip(sizes, held, strict=True))


def draft_vocabulary(table: pa.Table, size: int) -> NDArray[np.int32]:
    """The `size` tokens of largest mass, as rising ids; of equal ones the more frequent, then the lower id. Fewer when
    fewer tokens occur: any others may be added, none of them is known to be better."""
    ids_N: NDArray[np.int32] = table["token_id"].to_numpy()[_by_mass(table)[:size]]
    return np.sort(ids_N)


def _by_mass(table: pa.Table) -> NDArray[np.int64]:
    order_N: NDArray[np.int64] = np.lexsort((table["token_id"].to_numpy(), -table["count"].to_numpy(),
                                             -table["mass"].to_numpy()))
    return order_N


def _table(count_V: NDArray[np.int64], mass_V: NDArray[np.float64]) -> pa.Table:
    ids_N = np.flatnonzero((count_V > 0) | (mass_V > 0))
    return pa.table([ids_N.astype(np.int32), count_V[ids_N].astype(np.int64), mass_V[ids_N]], schema=TOKEN_SCHEMA)


def _row_sums(values_N: NDArray[np.float64], counts_R: NDArray[np.int64]) -> NDArray[np.float64]:
    """The sum of each row's entries. A row may have none, which `np.add.reduceat` does not allow."""
    rows_N = np.repeat(np.arange(len(counts_R)), counts_R)
    return np.bincount(rows_N, values_N, len(counts_R)).astype(np.float64, copy=False)


def _flat(traces: Sequence[Trace], attribute: str) -> NDArray[np.float64]:
    """An array of all traces in a row, as float64: exact for float32 and for every count."""
    return np.concatenate([np.empty(0), *(getattr(t, attribute) for t in traces)])


def _ids(traces: Sequence[Trace], attribute: str, vocab_size: int) -> NDArray[np.int32]:
    ids_N: NDArray[np.int32] = np.concatenate([np.empty(0, np.int32), *(getattr(t, attribute) for t in traces)])
    if len(ids_N) and ids_N.max() >= vocab_size:
        raise CaptureError(f"token id {ids_N.max()} lies outside the vocabulary of {vocab_size} tokens")
    return ids_N
