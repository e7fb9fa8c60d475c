"""Traces of which only the tokens are read: for who trains on hidden states alone.

Such a trace has a loss mask, but no rows, and whoever packs it finds nothing supervised. The trade-off against a type
of its own: all that takes a `Trace` takes it, and its mask and its rows disagree.

Shapes: T tokens, R supervised rows, N flat entries.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distill_pipe.errors import CaptureError
from distill_pipe.store.shard import MAIN_SCHEMA
from distill_pipe.store.trace import Trace

TOKENS_SCHEMA = pa.schema([MAIN_SCHEMA.field(name) for name in ("ordinal", "token_ids", "loss_mask")])
_NO_IDS, _NO_NUMBERS = np.empty(0, np.int32), np.empty(0, np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTrace(Trace):
    """A trace without its rows.

    Raises:
        CaptureError: tokens and loss mask differ in length.
    """

    def __post_init__(self) -> None:
        if len(self.loss_mask_T) != self.num_tokens:
            raise CaptureError(f"prompt {self.ordinal}: loss_mask has {len(self.loss_mask_T)} entries, expected "
                               f"{self.num_tokens}")

    @property
    def positions_R(self) -> NDArray[np.int64]:  # noqa: N802 - as in Trace
        """No position has a row."""
        return np.empty(0, np.int64)


def token_traces(table: pa.Table, vocab_size: int) -> Iterator[TokenTrace]:
    """The traces of the columns of `TOKENS_SCHEMA`.

    Raises:
        CaptureError: a loss mask does not fit, or a token id lies outside the vocabulary.
    """
    ids, masks = (table[name].combine_chunks() for name in ("token_ids", "loss_mask"))
    ids_N, masks_N = ids.values.to_numpy(), masks.values.to_numpy(zero_copy_only=False)
    id_edges, mask_edges = ids.offsets.to_numpy(), masks.offsets.to_numpy()
    for i, ordinal in enumerate(table["ordinal"].to_pylist()):
        tokens_T = ids_N[id_edges[i]:id_edges[i + 1]]
        if len(tokens_T) and not 0 <= int(tokens_T.min()) <= int(tokens_T.max()) < vocab_size:
            raise CaptureError(f"prompt {ordinal}: token ids from {tokens_T.min()} to {tokens_T.max()} do not fit a "
                               f"vocabulary of {vocab_size}")
        yield TokenTrace(
            ordinal=ordinal, prompt_id="", domain=None, finish_reason="", token_ids_T=tokens_T,
            loss_mask_T=masks_N[mask_edges[i]:mask_edges[i + 1]], logsumexp_R=_NO_NUMBERS, tail_mass_R=_NO_NUMBERS,
            next_logprob_R=_NO_NUMBERS, topk_counts_R=_NO_IDS, topk_ids_N=_NO_IDS, topk_logprobs_N=_NO_NUMBERS,
            tail_counts_R=_NO_IDS, tail_ids_N=_NO_IDS, tail_logprobs_N=_NO_NUMBERS)
