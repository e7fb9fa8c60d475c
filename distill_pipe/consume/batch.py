"""What a reader hands to a trainer: whole traces, laid end to end or one to a row.

Laid end to end no position is wasted, and attention must be told where traces end: by `cu_seqlens_B1` or by positions
that start again. A trainer that cannot do that asks for the `padded` form.

Shapes: T tokens of the batch (of the longest trace in the padded form), B traces, R supervised rows, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec
import torch
from torch import Tensor

from distill_pipe.consume.sparse import SparseTarget
from distill_pipe.consume.state import State

PADDING_ORDINAL = -1


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B whole traces laid end to end.

    Trace i occupies tokens `cu_seqlens_B1[i]` to `cu_seqlens_B1[i + 1]`; positions count from 0 in each. Row r
    supervises token index `rows_R[r]`: `target[r]` is the target's distribution of the token after it, and
    `next_ids_R[r]`, `next_logprob_R[r]` are that token as it was written, and its log-probability. `hidden[n]` is
    `[T, H]` and lines up with the tokens; the last token of a trace has no stored state, and its row is zero. It is
    bfloat16, or float32 where the dataset stores float32. The head of `target` is scaled so that it and the tail mass
    of its row add up to 1. `state` is where the reader stands after this batch: what to save with a checkpoint.

    A padding batch is one token that no row supervises, with ordinal -1. It keeps ranks in step, and has no loss.
    """

    token_ids_T: Tensor
    position_ids_T: Tensor
    cu_seqlens_B1: Tensor
    loss_mask_T: Tensor
    rows_R: Tensor
    next_ids_R: Tensor
    next_logprob_R: Tensor
    hidden: dict[int, Tensor]
    target: SparseTarget
    ordinals_B: Tensor
    state: State | None = None

    @property
    def is_padding(self) -> bool:
        """Whether this batch stands for no trace."""
        return bool((self.ordinals_B == PADDING_ORDINAL).all())

    def state_dict(self) -> dict[str, object]:
        """`state` as plain values, for a checkpoint; empty where there is none."""
        state: dict[str, object] = {} if self.state is None else msgspec.to_builtins(self.state)
        return state

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on another device."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in memory that a GPU can copy from by itself; `DataLoader(pin_memory=True)` asks for it."""
        return self._changed(Tensor.pin_memory)

    def padded(self, token_id: int = 0) -> "PaddedBatch":
        """One trace to a row, filled up with `token_id` at the end."""
        lengths_B = self.cu_seqlens_B1.diff().long()
        kept_BT = torch.arange(int(lengths_B.max()), device=lengths_B.device) < lengths_B[:, None]
        # Where the mask keeps something it is filled row by row, which is the order of the tokens.
        place_T = kept_BT.flatten().nonzero()[:, 0]

        def laid_out(values_T: Tensor, fill: float) -> Tensor:
            out = values_T.new_full((kept_BT.numel(), *values_T.shape[1:]), fill)
            out[place_T] = values_T
            return out.view(*kept_BT.shape, *values_T.shape[1:])

        return PaddedBatch(
            token_ids_BT=laid_out(self.token_ids_T, token_id), position_ids_BT=laid_out(self.position_ids_T, 0),
            attention_mask_BT=kept_BT, loss_mask_BT=laid_out(self.loss_mask_T, 0), rows_R=place_T[self.rows_R],
            next_ids_R=self.next_ids_R, next_logprob_R=self.next_logprob_R,
            hidden={n: laid_out(h_TH, 0) for n, h_TH in self.hidden.items()}, target=self.target,
            ordinals_B=self.ordinals_B, state=self.state)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            token_ids_T=change(self.token_ids_T), position_ids_T=change(self.position_ids_T),
            cu_seqlens_B1=change(self.cu_seqlens_B1), loss_mask_T=change(self.loss_mask_T),
            rows_R=change(self.rows_R), next_ids_R=change(self.next_ids_R),
            next_logprob_R=change(self.next_logprob_R), hidden={n: change(h) for n, h in self.hidden.items()},
            target=self.target.changed(change), ordinals_B=change(self.ordinals_B), state=self.state)


@dataclass(frozen=True, slots=True, eq=False)
class PaddedBatch:
    """B whole traces, one to a row of T tokens; `attention_mask_BT` is set where there is a token.

    Row r supervises index `rows_R[r]` of the flattened `[B * T]` tokens: `states_BTH.flatten(0, 1)[rows_R]` lines up
    with `target`. The rest is as in `Batch`.
    """

    token_ids_BT: Tensor
    position_ids_BT: Tensor
    attention_mask_BT: Tensor
    loss_mask_BT: Tensor
    rows_R: Tensor
    next_ids_R: Tensor
    next_logprob_R: Tensor
    hidden: dict[int, Tensor]
    target: SparseTarget
    ordinals_B: Tensor
    state: State | None = None


def join(batches: list[Batch]) -> Batch:
    """Several batches as one: the `collate_fn` for a `ShardDataset`. The state is that of the last."""
    starts = [0]
    for batch in batches:
        starts.append(starts[-1] + len(batch.token_ids_T))
    edges = [batch.cu_seqlens_B1[1:] + start for batch, start in zip(batches, starts, strict=False)]
    return replace(
        batches[-1],
        token_ids_T=torch.cat([b.token_ids_T for b in batches]),
        position_ids_T=torch.cat([b.position_ids_T for b in batches]),
        cu_seqlens_B1=torch.cat([batches[0].cu_seqlens_B1[:1], *edges]),
        loss_mask_T=torch.cat([b.loss_mask_T for b in batches]),
        rows_R=torch.cat([b.rows_R + start for b, start in zip(batches, starts, strict=False)]),
        next_ids_R=torch.cat([b.next_ids_R for b in batches]),
        next_logprob_R=torch.cat([b.next_logprob_R for b in batches]),
        hidden={n: torch.cat([b.hidden[n] for b in batches]) for n in batches[0].hidden},
        target=SparseTarget.cat([b.target for b in batches]),
        ordinals_B=torch.cat([b.ordinals_B for b in batches]))
