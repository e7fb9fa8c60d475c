"""One trace as exporters see it: tokens, loss mask, rows, and decoded hidden states, all on the CPU.

Hidden states exist for the first T-1 tokens, so S = T-1 is how much of a trace most trainers get: they pair every
token with a state. Nothing is lost by that, since the distribution of the last token is that of position T-2. States
are as stored, before the final norm; `final_norm` gives the other side.

Shapes: T tokens, S = T-1 positions with a state, R rows, K head entries, L layers, H hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from distill_pipe.consume.batch import Batch
from distill_pipe.consume.sparse import SparseTarget

Sample = dict[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One trace. Row r of `target` is the distribution of the token after position `positions_R[r]`; `hidden` maps a
    canonical layer to its states, `[S, H]`."""

    ordinal: int
    token_ids_T: Tensor
    loss_mask_T: Tensor
    positions_R: Tensor
    target: SparseTarget
    hidden: Mapping[int, Tensor]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)

    def states_SLH(self, layers: Sequence[int], dtype: torch.dtype) -> Tensor:  # noqa: N802 - a shape
        """The states of some layers, in that order."""
        return torch.stack([self.hidden[n].to(dtype) for n in layers], dim=1)


def batch_records(batch: Batch) -> Iterator[Record]:
    """The traces of a batch, in its order; none of a padding batch."""
    if batch.is_padding:
        return
    edges = batch.cu_seqlens_B1.tolist()
    rows_of = torch.searchsorted(batch.rows_R, torch.tensor(edges, device=batch.rows_R.device)).tolist()
    spans = zip(pairwise(edges), pairwise(rows_of), batch.ordinals_B.tolist(), strict=True)
    for (start, stop), (first, last), ordinal in spans:
        yield Record(
            ordinal=ordinal, token_ids_T=batch.token_ids_T[start:stop], loss_mask_T=batch.loss_mask_T[start:stop],
            positions_R=batch.rows_R[first:last] - start, target=batch.target[first:last],
            hidden={n: states_TH[start:stop - 1] for n, states_TH in batch.hidden.items()})


def at_positions(values_RX: Tensor, positions_R: Tensor, length: int) -> Tensor:
    """Rows laid at their positions of a sequence, `[length, X]`; zero elsewhere. Positions outside are left out."""
    placed_TX = values_RX.new_zeros(length, *values_RX.shape[1:])
    inside_R = (positions_R >= 0) & (positions_R < length)
    placed_TX[positions_R[inside_R]] = values_RX[inside_R]
    return placed_TX


def padded(values_SX: Tensor, length: int) -> Tensor:
    """The first `length` entries, with zeros behind where there are fewer."""
    out_TX = values_SX.new_zeros(length, *values_SX.shape[1:])
    kept = min(length, len(values_SX))
    out_TX[:kept] = values_SX[:kept]
    return out_TX
