"""Traces with coded hidden states to a batch: laid end to end, padded where rows differ, decoded in place.

Shapes: T tokens of the batch, B traces, R supervised rows, H hidden size.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distill_pipe.consume.batch import PADDING_ORDINAL, Batch
from distill_pipe.consume.sparse import FlatEntries, SparseTarget
from distill_pipe.consume.state import State
from distill_pipe.store.codec import head_shift
from distill_pipe.store.hidden_codec import decode_hidden
from distill_pipe.store.manifest import Run
from distill_pipe.store.sidecar import EncodedTrace
from distill_pipe.store.trace import Trace


def pack(encoded: Sequence[EncodedTrace], layers: Sequence[int], run: Run, state: State | None = None,
         device: torch.device | str = "cpu") -> Batch:
    """Lay traces end to end and decode their hidden states on `device`; all else is on the CPU."""
    traces = [e.trace for e in encoded]
    lengths_B = np.array([t.num_tokens for t in traces])
    starts_B1 = np.concatenate([[0], np.cumsum(lengths_B)])
    token_ids_T = _joined(traces, "token_ids_T").astype(np.int64)
    rows_R = np.concatenate([start + t.positions_R for start, t in zip(starts_B1[:-1], traces, strict=True)])
    tail_mass_R, topk_counts_R = _joined(traces, "tail_mass_R"), _joined(traces, "topk_counts_R")
    topk_logprobs_N = _joined(traces, "topk_logprobs_N")
    shift_R = head_shift(topk_logprobs_N, topk_counts_R, tail_mass_R)
    scaled_N = (topk_logprobs_N + np.repeat(shift_R, topk_counts_R)).astype(np.float32)
    head = FlatEntries(topk_counts_R, _joined(traces, "topk_ids_N"), scaled_N)
    tail = FlatEntries(_joined(traces, "tail_counts_R"), _joined(traces, "tail_ids_N"),
                       _joined(traces, "tail_logprobs_N"))
    return Batch(
        token_ids_T=torch.from_numpy(token_ids_T),
        position_ids_T=torch.from_numpy(np.arange(starts_B1[-1]) - np.repeat(starts_B1[:-1], lengths_B)),
        cu_seqlens_B1=torch.from_numpy(starts_B1.astype(np.int32)),
        loss_mask_T=torch.from_numpy(_joined(traces, "loss_mask_T")),
        rows_R=torch.from_numpy(rows_R), next_ids_R=torch.from_numpy(token_ids_T[rows_R + 1]),
        next_logprob_R=torch.from_numpy(_joined(traces, "next_logprob_R")),
        hidden={n: _packed_hidden(encoded, n, starts_B1, run, torch.device(device)) for n in layers},
        target=SparseTarget.from_flat(head, tail, tail_mass_R, run.spec.target.vocab_size,
                                      run.spec.capture.logprob_bits, shift_R),
        ordinals_B=torch.tensor([t.ordinal for t in traces]), state=state)


def padding(layers: Sequence[int], run: Run, state: State | None = None,
            device: torch.device | str = "cpu") -> Batch:
    """A batch that stands for no trace: one token, no supervised row."""
    nothing_R, nothing_RX = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.int64)
    return Batch(
        token_ids_T=torch.zeros(1, dtype=torch.int64), position_ids_T=torch.zeros(1, dtype=torch.int64),
        cu_seqlens_B1=torch.tensor([0, 1], dtype=torch.int32), loss_mask_T=torch.zeros(1, dtype=torch.bool),
        rows_R=nothing_R, next_ids_R=nothing_R, next_logprob_R=nothing_R.float(),
        hidden={n: torch.zeros(1, run.spec.target.hidden_size, dtype=_hidden_dtype(run), device=device)
                for n in layers},
        target=SparseTarget(nothing_RX, nothing_RX.float(), nothing_R.float(), nothing_RX, nothing_RX.float(),
                            run.spec.target.vocab_size),
        ordinals_B=torch.tensor([PADDING_ORDINAL]), state=state)


def _packed_hidden(encoded: Sequence[EncodedTrace], layer: int, starts_B1: np.ndarray, run: Run,
                   device: torch.device) -> Tensor:
    codec, hidden_size = run.spec.capture.hidden_codec, run.spec.target.hidden_size
    dtype = _hidden_dtype(run)
    packed_TH = _memory(int(starts_B1[-1]), hidden_size, dtype, device)
    for start, one in zip(starts_B1[:-1], encoded, strict=True):
        last = start + one.trace.num_tokens - 1
        decode_hidden(one.blobs[layer], codec, hidden_size, dtype=dtype, device=device, out_NH=packed_TH[start:last])
        packed_TH[last] = 0
    return packed_TH


def _memory(tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty(tokens, hidden_size, dtype=dtype, device=device)
    # From Arrow, which uses freed memory again: what comes new from the system takes longer than some codecs.
    memory = pa.allocate_buffer(tokens * hidden_size * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(-1, hidden_size)


def _hidden_dtype(run: Run) -> torch.dtype:
    return torch.float32 if run.spec.capture.hidden_codec == "f32" else torch.bfloat16


def _joined(traces: Sequence[Trace], attribute: str) -> np.ndarray:
    return np.concatenate([getattr(t, attribute) for t in traces])
