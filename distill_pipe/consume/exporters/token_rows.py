"""Layouts of a head per token, for trainers of whole models: Arrow folders of lists, one row per trace.

Every position has K entries, whether it is supervised or not, since the trainers make rectangles of them. Shapes: T
tokens, R supervised rows, K entries.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import torch
from torch import Tensor

from distill_pipe.consume.exporters.arrow_folder import write_state, write_stream
from distill_pipe.consume.exporters.inventory import Inventory
from distill_pipe.consume.exporters.layout import Address, ExportOptions, Layout, head_entries
from distill_pipe.consume.exporters.record import Record, Sample
from distill_pipe.consume.sparse import PADDING
from distill_pipe.store.manifest import Run

IGNORED = -100
_KINDS = {torch.int64: pa.int32(), torch.int32: pa.int32(), torch.int8: pa.int8(), torch.float32: pa.float32()}


class TokenRows(Layout):
    """Heads of `top_k` entries at every position."""

    samples_per_file: ClassVar[int] = 128
    drops_tail: ClassVar[bool] = True

    def __init__(self, root: Address, run: Run, options: ExportOptions) -> None:
        super().__init__(root, run, options)
        self.top_k = head_entries(root, run, options)

    def file_name(self, first: int) -> str:
        return f"data-{first // self.samples_per_file:06d}.arrow"

    def write(self, path: Path, samples: Sequence[Sample]) -> None:
        columns = {name: _lists([s[name] for s in samples]) for name in samples[0]}
        table = pa.table(columns)
        write_stream(path, table.schema, [table])

    def finish(self, folder: Path, inventory: Inventory) -> None:
        names = [self.file_name(first) for first in range(0, len(inventory), self.samples_per_file)]
        write_state(folder, names, inventory.run.fingerprint, None)


def head_of(record: Record, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and which of them are held, `[R, top_k]`. Entries that a row lacks have id 0."""
    ids_RK, logprobs_RK = record.target.topk_ids_RK[:, :top_k], record.target.topk_logprobs_RK[:, :top_k]
    missing = top_k - ids_RK.shape[1]
    ids_RK = torch.nn.functional.pad(ids_RK, (0, missing), value=PADDING)
    logprobs_RK = torch.nn.functional.pad(logprobs_RK, (0, missing))
    held_RK = ids_RK != PADDING
    return torch.where(held_RK, ids_RK, 0), torch.where(held_RK, logprobs_RK, 0.0), held_RK


def _lists(tensors: Sequence[Tensor]) -> pa.Array:
    """A column of lists, or of lists of lists."""
    joined = torch.cat(list(tensors))
    values = pa.array(joined.flatten().numpy(), _KINDS[joined.dtype])
    if joined.ndim == 2:
        edges = torch.arange(0, joined.numel() + 1, joined.shape[1], dtype=torch.int32)
        values = pa.ListArray.from_arrays(pa.array(edges.numpy()), values)
    edges = torch.tensor([0, *[len(t) for t in tensors]], dtype=torch.int32).cumsum(0).int()
    return pa.ListArray.from_arrays(pa.array(edges.numpy()), values)
