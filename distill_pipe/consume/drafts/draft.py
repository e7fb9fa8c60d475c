"""What all reference drafts have in common: a chain of drafting steps, and the rows its outputs are compared with.

Alignment. After position t the target has the hidden state g_t and has sampled token t+1. Every draft here starts
there, at *anchor* t, and drafts the tokens after it. Step k (0 is the first) is compared with the target's row that
supervises position t+1+k:

    step                        0               1               k
    newest token read           x_{t+1}         x_{t+2}         x_{t+1+k}
    draft output                q(x_{t+2})      q(x_{t+3})      q(x_{t+2+k})
    supervised position of row  t+1             t+2             t+1+k

Training is teacher-forced: the newest token of step k is the one that was written, for every anchor at once. A row at
position s therefore has a draft output at step k from s = k+1 on. Drafts whose steps share their weights can be run for
more steps than they were trained for; the others end at `positions`.

Shapes: T tokens, A anchors (all T in training), R rows, H hidden size, V vocabulary, D draft vocabulary.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from distill_pipe.consume.drafts.target_files import DraftConfig, read_tables
from distill_pipe.consume.reader import Batch
from distill_pipe.consume.vocabulary import DraftVocabulary
from distill_pipe.errors import UsageError

POSITIONS = 6


class Chain(Protocol):
    """Drafting in progress, at every anchor of a batch."""

    def step(self, next_ids_A: Tensor) -> Tensor:
        """Draft states `[A, H]` of the next step, given the newest token of each anchor."""

    def narrow(self, anchors_A: Tensor) -> None:
        """Go on at some of the anchors only; `anchors_A` are token indices in ascending order."""


class Draft(nn.Module):
    """A draft model. Subclasses name their weights as the layout of their checkpoints does.

    Args:
        config: sizes, from the target.
        layers: canonical layers of the target whose states it reads, shallow to deep.
        positions: steps it is trained for.
        vocabulary: the tokens it can draft, where these are not all of the target's.
    """

    arch: ClassVar[str]
    recurrent: ClassVar[bool]
    # Weights that are the target's own and that engines take from the target.
    unsaved: ClassVar[tuple[str, ...]] = ()
    target_norm_H: Tensor
    _d2t_D: Tensor | None
    _t2d_V: Tensor | None

    def __init__(self, config: DraftConfig, layers: Sequence[int], positions: int = POSITIONS,
                 vocabulary: DraftVocabulary | None = None) -> None:
        super().__init__()
        if positions < 1:
            raise UsageError(f"a draft needs at least one position, and is asked for {positions}")
        self.config, self.layers, self.positions = config, tuple(layers), positions
        self.draft_vocab_size = config.vocab_size if vocabulary is None else vocabulary.size
        # Buffers, so that they follow the weights to another device.
        self.register_buffer("_d2t_D", None if vocabulary is None else vocabulary.d2t_D, persistent=False)
        self.register_buffer("_t2d_V", None if vocabulary is None else vocabulary.t2d_V, persistent=False)
        # The target's final norm, for drafts that read its last state as its head does. Engines hand that over normed.
        self.register_buffer("target_norm_H", torch.ones(config.hidden_size), persistent=False)

    @classmethod
    @abstractmethod
    def layers_read(cls, stored: Sequence[int], num_layers: int) -> tuple[int, ...]:
        """Which of the stored layers of a target with `num_layers` a draft of this kind reads.

        Raises:
            UsageError: the dataset does not store what it needs.
        """

    @abstractmethod
    def begin(self, hidden: Mapping[int, Tensor], position_ids_T: Tensor, cu_seqlens_B1: Tensor) -> Chain:
        """Start a chain at every token of some sequences laid end to end; all as in a `Batch`."""

    @abstractmethod
    def logits(self, states_RH: Tensor, position: int) -> Tensor:
        """Logits `[R, D]` of some states of a step; `position` counts from 0."""

    @abstractmethod
    def take_over(self, embedding_VH: Tensor, head_DH: Tensor, norm_H: Tensor) -> None:
        """Start from the target's embedding, the rows of its lm_head that can be drafted, and its final norm."""

    @abstractmethod
    def engine_config(self) -> dict[str, object]:
        """config.json as vLLM 0.32 reads it."""

    def forward(self, batch: Batch, positions: int | None = None) -> list[Tensor]:
        """Teacher-forced draft states `[T, H]` of each step. Those of anchors without a later row mean nothing."""
        steps = positions or self.positions
        chain = self.begin(batch.hidden, batch.position_ids_T, batch.cu_seqlens_B1)
        states = [chain.step(batch.token_ids_T.roll(-1))]
        if steps == 1:
            return states
        # Only the first step of every token is seen by others; what follows a prompt's tokens would be thrown away.
        wanted_T = torch.zeros_like(batch.token_ids_T, dtype=torch.bool)
        for k in range(1, steps):
            wanted_T[drafted_rows(batch, k)[0]] = True
        anchors_A = wanted_T.nonzero()[:, 0]
        chain.narrow(anchors_A)
        for k in range(1, steps):
            states_AH = chain.step(batch.token_ids_T.roll(-1 - k)[anchors_A])
            states.append(states_AH.new_zeros(states[0].shape).index_copy(0, anchors_A, states_AH))
        return states

    @property
    def vocabulary(self) -> DraftVocabulary | None:
        """The tokens it can draft, where these are not all of the target's; on the device of the weights."""
        return None if self._d2t_D is None or self._t2d_V is None else DraftVocabulary(self._d2t_D, self._t2d_V)

    @property
    def device(self) -> torch.device:
        return self.target_norm_H.device

    def final_state(self, hidden: Mapping[int, Tensor]) -> Tensor:
        """The target's last state behind its final norm, `[T, H]`: what its own head reads."""
        state_TH = hidden[self.layers[-1]].to(self.target_norm_H.dtype)
        return nn.functional.rms_norm(state_TH, state_TH.shape[1:], self.target_norm_H, self.config.rms_norm_eps)

    def start_from_target(self, folder: Path) -> None:
        """Take over the target's embedding, lm_head (the embedding where they are tied) and final norm.

        Raises:
            UsageError: the folder lacks the embedding or the norm.
        """
        embedding_VH, head_VH, norm_H = read_tables(folder)
        head_DH = head_VH if self.vocabulary is None else head_VH[self.vocabulary.d2t_D]
        with torch.no_grad():
            self.target_norm_H.copy_(norm_H)
            self.take_over(embedding_VH, head_DH, norm_H)


def drafted_rows(batch: Batch, position: int = 0) -> tuple[Tensor, Tensor]:
    """The pairs of a step: anchors (indices into T), and the numbers of the rows they are compared with."""
    rows_R = torch.arange(len(batch.rows_R), device=batch.rows_R.device)
    drafted_R = batch.position_ids_T[batch.rows_R] > position
    return batch.rows_R[drafted_R] - 1 - position, rows_R[drafted_R]


def last_layer(stored: Sequence[int], num_layers: int, arch: str) -> tuple[int, ...]:
    """The target's last layer alone.

    Raises:
        UsageError: it is not stored.
    """
    if num_layers not in stored:
        raise UsageError(f"a draft of the kind {arch} reads the target's last layer, {num_layers}; this dataset stores "
                         f"{list(stored) or 'no hidden states'}. Generate it with --layers ...,{num_layers}")
    return (num_layers,)
