"""Layouts of token ids, loss mask, auxiliary states side by side, and the last state behind the final norm.

A sample has the S = T-1 tokens that have a state. The loss mask is that of the tokens, as the trainers' own producers
write it: an EAGLE draft reads the first token of a response and never predicts it.

Shapes: S positions, L auxiliary layers, H hidden size.
"""

from typing import ClassVar

from torch import Tensor, nn

from distill_pipe.consume.exact import final_norm
from distill_pipe.consume.exporters.layout import Address, ExportOptions, Layout, aux_layers, last_layer
from distill_pipe.consume.exporters.record import Record
from distill_pipe.errors import UsageError
from distill_pipe.store.manifest import Run


class StatesLayout(Layout):
    """Auxiliary states and the last one. Trainers number decoder layers from 0: canonical layer n is their n - 1, and
    the embeddings, where they take them, -1."""

    aux_count: ClassVar[int | None] = None
    takes_embeddings: ClassVar[bool] = False

    def __init__(self, root: Address, run: Run, options: ExportOptions) -> None:
        super().__init__(root, run, options)
        self.aux = aux_layers(root, run, options, self.name, self.aux_count)
        if 0 in self.aux and not self.takes_embeddings:
            raise UsageError(f"{self.name} has no number for layer 0, the embeddings; leave it out with --layers")
        self.last = last_layer(root, run, self.name)
        self.layers = (*self.aux, self.last)
        self._norm = _norm_of(root)

    @property
    def layer_ids(self) -> list[int]:
        return [n - 1 for n in self.aux]

    def aux_SW(self, record: Record) -> Tensor:  # noqa: N802 - a shape: W = L * H
        """The auxiliary states, layer after layer along the width."""
        return record.states_SLH(self.aux, self.dtype).flatten(1)

    def last_SH(self, record: Record) -> Tensor:  # noqa: N802 - a shape
        """The last state, behind the final norm."""
        normed_SH: Tensor = self._norm(record.hidden[self.last].float())
        return normed_SH.to(self.dtype)


def _norm_of(root: Address) -> nn.RMSNorm:
    try:
        return final_norm(root)
    except UsageError as error:
        raise UsageError(f"{error}; or export for a trainer that takes the last state before the norm (speculators)"
                         ) from error


def paired_tokens(record: Record) -> tuple[Tensor, Tensor]:
    """Ids and loss mask (0 or 1) of the tokens that have a state, int64."""
    return record.token_ids_T[:-1], record.loss_mask_T[:-1].long()
