"""What a stored row costs in bytes, and what it makes of the acceptance rate alpha = sum_v min(p, q).

Rows are those of a real target over 49,152 tokens. Every variant is written as real Parquet, read back, and given to
the package's own loss, beside: the same columns in plain types, the 64 likeliest tokens with the rest dropped or
renormalised away (what other tools keep), other roundings, and heads of adaptive size. The truth is alpha over the
whole vocabulary in float64. The draft is the target's logits, flattened and with noise: q = softmax(0.9 z + 0.8 n).

Bytes are the compressed bytes of all columns that hold the distribution, page headers included. The standard error is
over rows, each the mean over its drafts. The head's total variation (TV) is 0.5 sum |p - p_read| over its tokens.

Shapes: R rows, K head entries, M tail samples, N flat entries, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from format_data import Captured, captured, chunks, print_table
from numpy.typing import NDArray
from torch import Tensor

from distill_pipe.consume.losses import TailRule, tv_loss
from distill_pipe.consume.packing import pack
from distill_pipe.consume.sparse import FlatEntries, SparseTarget
from distill_pipe.produce.head import HeadReducer, HeadRows, row_uniforms
from distill_pipe.store.manifest import Run, shard_name
from distill_pipe.store.shard import (
    MAIN_SCHEMA,
    main_table,
    read_main,
    read_shard_info,
    traces_from_table,
    write_main,
)
from distill_pipe.store.sidecar import EncodedTrace
from distill_pipe.store.spec import CaptureSpec
from distill_pipe.store.trace import Trace

pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("default")]

COLUMNS = ("logsumexp", "tail_mass", "next_logprob", "topk_counts", "topk_ids", "topk_logprobs", "tail_counts",
           "tail_ids", "tail_logprobs")
LOGPROBS = ("topk_logprobs", "tail_logprobs")
SHIPPED = CaptureSpec()
EXACT_BITS, PEERS_K, LARGEST_K, NOISE_DRAWS = 24, 64, 256, 3
LEAST_ROWS, MOST_BYTES, MOST_BIAS, MOST_ERROR = 5000, 110, 0.002, 0.02


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to store the rows: what it costs, what is read back, and what a loss makes of the tail."""

    name: str
    bytes_per_row: float
    target: SparseTarget
    tail: TailRule = "sampled"


@dataclass(frozen=True)
class Score:
    """What a variant did to alpha and to the head."""

    bias: float
    standard_error: float
    mean_error: float
    head_tv: float


@pytest.mark.timeout(1800)
def test_a_row_takes_at_most_110_bytes_and_leaves_alpha_unbiased(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.set_num_threads(1)
    data, folder = captured(tmp_path_factory), tmp_path_factory.mktemp("head")
    # Every third prompt: chat and code as in the whole, and few enough rows to hold their logits.
    exact = data.traces[::3]
    logits_RV = data.logits(exact)
    check_logits(exact, logits_RV)
    variants = [*ours(data, exact, logits_RV, folder), *plain(data, exact, logits_RV, folder)]
    scores, alpha = measure(variants, logits_RV)
    rows = [(v.name, f"{v.bytes_per_row:.1f}", f"{s.bias:+.5f}", f"{s.standard_error:.5f}", f"{s.mean_error:.4f}",
             f"{s.head_tv:.5f}") for v, s in zip(variants, scores, strict=True)]
    print_table(f"Distribution columns: {len(logits_RV)} rows, vocabulary {logits_RV.shape[1]}, {NOISE_DRAWS} drafts; "
                f"true alpha {alpha:.4f}",
                ("stored", "bytes/row", "bias of alpha", "standard error", "mean abs. error", "head TV"), rows)
    assert len(logits_RV) >= LEAST_ROWS
    assert variants[0].bytes_per_row <= MOST_BYTES
    assert abs(scores[0].bias) <= MOST_BIAS
    assert scores[0].mean_error <= MOST_ERROR


def check_logits(traces: Sequence[Trace], logits_RV: Tensor) -> None:
    """The logits that were computed here are those that the engine had."""
    stored_R = np.concatenate([t.logsumexp_R for t in traces])
    computed_R = torch.cat([logits_RV[rows].logsumexp(1) for rows in chunks(len(logits_RV))]).numpy()
    assert np.abs(stored_R - computed_R).max() <= 1e-3


def ours(data: Captured, exact: Sequence[Trace], logits_RV: Tensor, folder: Path) -> list[Variant]:
    """The shipped format first, then other roundings and adaptive heads in the same files."""
    traces = reduced(exact, logits_RV, SHIPPED)
    bits = {b: main_table(traces, b)[0] for b in (SHIPPED.logprob_bits, 6, 8, 9)}
    tables = {f"K=32, M=8, {b} significant bits{' (shipped)' * (b == SHIPPED.logprob_bits)}": (table, SHIPPED)
              for b, table in bits.items()}
    for steps in (16, 32, 64):
        tables[f"K=32, M=8, grid of 1/{steps} nat"] = (on_grid(bits[SHIPPED.logprob_bits], traces, steps), SHIPPED)
    for coverage in (0.9, 0.99):
        spec = CaptureSpec(top_k=LARGEST_K, coverage=coverage)
        adaptive = reduced(exact, logits_RV, spec)
        mean_k = np.concatenate([t.topk_counts_R for t in adaptive]).mean()
        tables[f"coverage {coverage} (K {mean_k:.1f} on average, at most {LARGEST_K}), M=8"] = (
            main_table(adaptive, spec.logprob_bits)[0], spec)
    return [through_a_shard(data, name, table, spec, folder) for name, (table, spec) in tables.items()]


def through_a_shard(data: Captured, name: str, table: pa.Table, spec: CaptureSpec, folder: Path) -> Variant:
    """Write a main shard and read it as a consumer does, who scales the head."""
    path, rows = folder / "shard.parquet", sum(map(len, table["logsumexp"]))
    info = msgspec.structs.replace(read_shard_info(data.root.local(shard_name(0))), traces=table.num_rows, rows=rows,
                                   tokens=sum(map(len, table["token_ids"])))
    write_main(path, table, info)
    traces = [EncodedTrace(t) for t in traces_from_table(read_main(path, info, spec))]
    return Variant(name, bytes_of(path, COLUMNS) / rows, pack(traces, (), data.run).target)


def plain(data: Captured, exact: Sequence[Trace], logits_RV: Tensor, folder: Path) -> list[Variant]:
    """Exact numbers in plain types, as Parquet with zstd and pyarrow's defaults."""
    variants = []
    shipped = reduced(exact, logits_RV, SHIPPED)
    for name, ids, floats in (("int64 and float32", pa.int64(), pa.float32()),
                              ("int32 and float16", pa.int32(), pa.float16())):
        table = plain_table(shipped, COLUMNS, ids, floats)
        variants.append(plain_variant(data.run, f"K=32, M=8, {name} lists", table, folder))
    largest = reduced(exact, logits_RV, CaptureSpec(top_k=PEERS_K, tail_samples=0))
    table = plain_table(largest, ("topk_counts", "topk_ids", "topk_logprobs"), pa.int64(), pa.float32())
    dropped = plain_variant(data.run, f"K={PEERS_K}, int64 and float32 lists, rest dropped", table, folder)
    head_RK = dropped.target.topk_logprobs_RK
    renormalised = replace(dropped.target, topk_logprobs_RK=head_RK.log_softmax(1))
    return [*variants, replace(dropped, tail="drop"),
            Variant(dropped.name.replace("dropped", "renormalised away"), dropped.bytes_per_row, renormalised, "drop")]


def plain_table(traces: Sequence[Trace], columns: Sequence[str], ids: pa.DataType, floats: pa.DataType) -> pa.Table:
    """Some columns of the main shard with exact numbers in other types; counts are ids here."""
    table = main_table(traces, EXACT_BITS)[0].select(columns)
    fields = [(f.name, pa.list_(floats if pa.types.is_floating(f.type.value_type) else ids)) for f in table.schema]
    return table.cast(pa.schema(fields))


def plain_variant(run: Run, name: str, table: pa.Table, folder: Path) -> Variant:
    path = folder / "plain.parquet"
    pq.write_table(table, path, compression="zstd")
    read = {name: flat(pq.read_table(path), name) for name in table.column_names}
    counts_R = read["topk_counts"].astype(np.int32)
    nothing = np.zeros(len(counts_R), np.int32)
    head = FlatEntries(counts_R, read["topk_ids"].astype(np.int32), read["topk_logprobs"].astype(np.float32))
    tail = FlatEntries(read.get("tail_counts", nothing).astype(np.int32),
                       read.get("tail_ids", nothing[:0]).astype(np.int32),
                       read.get("tail_logprobs", nothing[:0]).astype(np.float32))
    mass_R = read.get("tail_mass", nothing).astype(np.float32)
    target = SparseTarget.from_flat(head, tail, mass_R, run.spec.target.vocab_size)
    return Variant(name, bytes_of(path, table.column_names) / len(counts_R), target)


def flat(table: pa.Table, column: str) -> NDArray[np.generic]:
    """All entries of a list column, end to end."""
    entries: NDArray[np.generic] = table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return entries


def bytes_of(path: Path, columns: Sequence[str]) -> int:
    """Compressed bytes of some columns of a file, page headers and dictionaries included."""
    footer = pq.read_metadata(path)
    parts = [footer.row_group(g).column(c) for g in range(footer.num_row_groups) for c in range(footer.num_columns)]
    return sum(p.total_compressed_size for p in parts if p.path_in_schema.partition(".")[0] in columns)


def on_grid(table: pa.Table, traces: Sequence[Trace], steps: int) -> pa.Table:
    """The same table with exact log-probabilities rounded to 1/steps nat instead of to significant bits."""
    for name in LOGPROBS:
        exact_N = np.concatenate([getattr(t, f"{name}_N") for t in traces])
        values = pa.array(np.round(exact_N * steps) / np.float32(steps), pa.float32())
        column = pa.ListArray.from_arrays(table[name].combine_chunks().offsets, values)
        table = table.set_column(MAIN_SCHEMA.get_field_index(name), MAIN_SCHEMA.field(name), column)
    return table


def reduced(exact: Sequence[Trace], logits_RV: Tensor, spec: CaptureSpec) -> list[Trace]:
    """The traces with what capture keeps of their logits, not rounded yet."""
    uniform_R = torch.from_numpy(np.concatenate([row_uniforms(0, t.ordinal, t.positions_R) for t in exact]))
    next_R = torch.from_numpy(np.concatenate([t.token_ids_T[t.positions_R + 1] for t in exact]).astype(np.int64))
    reducer = HeadReducer(spec)
    parts = [reducer.rows(logits_RV[rows], uniform_R[rows], next_R[rows]).tensors() for rows in chunks(len(logits_RV))]
    kept = HeadRows(*(torch.cat(p) for p in zip(*parts, strict=True)))
    starts = np.cumsum([0, *(t.num_rows for t in exact)])
    return [_with_rows(t, HeadRows(*(part[a:b] for part in kept.tensors())))
            for t, a, b in zip(exact, starts[:-1], starts[1:], strict=True)]


def _with_rows(trace: Trace, kept: HeadRows) -> Trace:
    head_RK, tail_RM = kept.topk_ids_RK >= 0, kept.tail_ids_RM >= 0
    return replace(
        trace, hidden={}, logsumexp_R=kept.logsumexp_R.numpy(), tail_mass_R=kept.tail_mass_R.numpy(),
        next_logprob_R=kept.next_logprob_R.numpy(),
        topk_counts_R=head_RK.sum(1).int().numpy(), topk_ids_N=kept.topk_ids_RK[head_RK].numpy(),
        topk_logprobs_N=kept.topk_logprobs_RK[head_RK].numpy(),
        tail_counts_R=tail_RM.sum(1).int().numpy(), tail_ids_N=kept.tail_ids_RM[tail_RM].numpy(),
        tail_logprobs_N=kept.tail_logprobs_RM[tail_RM].numpy())


def measure(variants: Sequence[Variant], logits_RV: Tensor) -> tuple[list[Score], float]:
    """Every variant against the same drafts, and their mean alpha."""
    noise = torch.Generator().manual_seed(0)
    error_VDR = torch.empty(len(variants), NOISE_DRAWS, len(logits_RV), dtype=torch.float64)
    tv_VR = torch.empty(len(variants), len(logits_RV), dtype=torch.float64)
    alpha_DR = torch.empty(NOISE_DRAWS, len(logits_RV), dtype=torch.float64)
    for rows in chunks(len(logits_RV)):
        p_RV = logits_RV[rows].double().softmax(1)
        for v, variant in enumerate(variants):
            tv_VR[v, rows] = head_tv(p_RV, variant.target[rows])
        for draw in range(NOISE_DRAWS):
            draft_RV = 0.9 * logits_RV[rows] + 0.8 * torch.randn(p_RV.shape, generator=noise)
            alpha_DR[draw, rows] = torch.minimum(p_RV, draft_RV.double().softmax(1)).sum(1)
            for v, variant in enumerate(variants):
                stored = tv_loss(draft_RV, variant.target[rows], tail=variant.tail)
                error_VDR[v, draw, rows] = stored.alpha_R.double() - alpha_DR[draw, rows]
    row_mean_VR = error_VDR.mean(1)
    standard_error_V = row_mean_VR.std(1) / row_mean_VR.shape[1]**0.5
    columns = (row_mean_VR.mean(1), standard_error_V, error_VDR.abs().mean((1, 2)), tv_VR.mean(1))
    return [Score(*map(float, values)) for values in zip(*columns, strict=True)], float(alpha_DR.mean())


def head_tv(p_RV: Tensor, target: SparseTarget) -> Tensor:
    """What storing changed of the head's probabilities, as total variation of each row."""
    held_RK = target.topk_ids_RK >= 0
    exact_RK = p_RV.gather(1, target.topk_ids_RK.clamp(min=0))
    off_RK = (target.topk_logprobs_RK.double().exp() - exact_RK).abs()
    return 0.5 * torch.where(held_RK, off_RK, 0.0).sum(1)
