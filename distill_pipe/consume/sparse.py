"""The target's distribution at R positions, as a loss sees it: a head of exact log-probabilities and a sampled tail.

Rows hold different numbers of entries, so both parts are padded to the longest row; a padded entry has id -1, and
whatever stands in its log-probability is never used. The trade-off against flat lists with offsets: some bytes of
padding, for gathers and sums that are plain tensor operations.

Each tail sample of a row is, marginally, a draw from the target's own distribution outside the head, and carries the
weight `tail_mass / number of samples`. Samples may repeat.

Shapes: R rows, K head entries of the longest row, M tail samples of the longest row, N flat entries, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_pipe.errors import UsageError
from distill_pipe.store.codec import FLOAT32_BITS

PADDING = -1


@dataclass(frozen=True, slots=True)
class FlatEntries:
    """Entries of R rows laid end to end: `counts_R[r]` of them belong to row r."""

    counts_R: NDArray[np.int32]
    ids_N: NDArray[np.int32]
    logprobs_N: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class SparseTarget:
    """R rows of a target distribution over `vocab_size` tokens; log-probabilities are natural and never renormalised.

    Bounds also want to know how exact that is. `logprob_bits` is how many significant bits the log-probabilities were
    rounded to (`CaptureSpec.logprob_bits`; 24 for not at all), and `topk_shift_R` what was added to each row's head
    afterwards (`head_shift`), 0 when not given.

    Raises:
        UsageError: the shapes do not fit each other, or rows have no head.
    """

    topk_ids_RK: Tensor
    topk_logprobs_RK: Tensor
    tail_mass_R: Tensor
    tail_ids_RM: Tensor
    tail_logprobs_RM: Tensor
    vocab_size: int
    logprob_bits: int = FLOAT32_BITS
    topk_shift_R: Tensor | None = None

    def __post_init__(self) -> None:
        rows = self.tail_mass_R.shape
        for name, ids, logprobs in (("head", self.topk_ids_RK, self.topk_logprobs_RK),
                                    ("tail", self.tail_ids_RM, self.tail_logprobs_RM)):
            if len(rows) != 1 or ids.ndim != 2 or ids.shape[:1] != rows or ids.shape != logprobs.shape:
                raise UsageError(f"the {name} has ids of shape {tuple(ids.shape)} and log-probabilities of shape "
                                 f"{tuple(logprobs.shape)} for a tail mass of shape {tuple(rows)}")
        if self.topk_shift_R is not None and self.topk_shift_R.shape != rows:
            raise UsageError(f"shifts have shape {tuple(self.topk_shift_R.shape)} for a tail mass of shape "
                             f"{tuple(rows)}")
        if len(self) and self.topk_ids_RK.shape[1] == 0:
            raise UsageError("a target needs at least one head entry per row")

    @classmethod
    def from_flat(cls, head: FlatEntries, tail: FlatEntries, tail_mass_R: NDArray[np.float32], vocab_size: int,
                  logprob_bits: int = FLOAT32_BITS, topk_shift_R: NDArray[np.floating] | None = None
                  ) -> "SparseTarget":
        """Pad flat lists, as shards store them.

        Raises:
            UsageError: a token id lies outside the vocabulary, or the lists do not fit each other.
        """
        return cls(*_padded(head, vocab_size), torch.from_numpy(np.array(tail_mass_R, np.float32)),
                   *_padded(tail, vocab_size), vocab_size, logprob_bits,
                   None if topk_shift_R is None else torch.from_numpy(topk_shift_R.astype(np.float32)))

    @classmethod
    def from_logits(cls, logits_RV: Tensor, top_k: int, tail_samples: int,
                    generator: torch.Generator | None = None) -> "SparseTarget":
        """Reduce dense target logits: the `top_k` largest, and systematic samples of the rest.

        Systematic: one uniform number places `tail_samples` equally spaced marks on the tail's cumulative mass, which
        has the marginals of independent draws and a smaller variance.
        """
        num_rows, vocab_size = logits_RV.shape
        logprobs_RV = logits_RV.detach().double().log_softmax(1)
        topk_logprobs_RK, topk_ids_RK = logprobs_RV.topk(min(top_k, vocab_size), dim=1)
        mass_RV = logprobs_RV.exp().scatter(1, topk_ids_RK, 0.0).cumsum(1)
        tail_mass_R1 = mass_RV[:, -1:]
        start_R1 = torch.rand(num_rows, 1, generator=generator, dtype=torch.float64).to(logits_RV.device)
        marks_RM = (start_R1 + torch.arange(tail_samples, device=logits_RV.device)) / max(tail_samples, 1)
        found_RM = torch.searchsorted(mass_RV, marks_RM * tail_mass_R1, right=True).clamp(max=vocab_size - 1)
        tail_logprobs_RM = logprobs_RV.gather(1, found_RM)
        tail_ids_RM = torch.where(tail_mass_R1 > 0, found_RM, PADDING)
        return cls(topk_ids_RK, topk_logprobs_RK.float(), tail_mass_R1[:, 0].float(), tail_ids_RM,
                   tail_logprobs_RM.float(), vocab_size)

    @classmethod
    def cat(cls, targets: Sequence["SparseTarget"]) -> "SparseTarget":
        """The rows of several targets, one after the other, known as exactly as the least exact of them.

        Raises:
            UsageError: there are none, or their vocabularies differ.
        """
        if len({t.vocab_size for t in targets}) != 1:
            raise UsageError("only targets over one vocabulary can be joined")
        return cls(_cat([t.topk_ids_RK for t in targets], PADDING),
                   _cat([t.topk_logprobs_RK for t in targets], -torch.inf),
                   torch.cat([t.tail_mass_R for t in targets]),
                   _cat([t.tail_ids_RM for t in targets], PADDING),
                   _cat([t.tail_logprobs_RM for t in targets], -torch.inf), targets[0].vocab_size,
                   min(t.logprob_bits for t in targets), _cat_shifts(targets))

    def __len__(self) -> int:
        return len(self.tail_mass_R)

    def __getitem__(self, rows: slice | Tensor) -> "SparseTarget":
        """Some rows: a slice, a boolean mask, or row numbers. The padding keeps its width."""
        return self.changed(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> "SparseTarget":
        """The same rows on another device."""
        return self.changed(lambda tensor: tensor.to(device))

    def changed(self, change: Callable[[Tensor], Tensor]) -> "SparseTarget":
        """The same with every tensor put through `change`."""
        shift_R = None if self.topk_shift_R is None else change(self.topk_shift_R)
        return SparseTarget(change(self.topk_ids_RK), change(self.topk_logprobs_RK), change(self.tail_mass_R),
                            change(self.tail_ids_RM), change(self.tail_logprobs_RM), self.vocab_size,
                            self.logprob_bits, shift_R)


def _padded(entries: FlatEntries, vocab_size: int) -> tuple[Tensor, Tensor]:
    counts_R = entries.counts_R
    if not int(counts_R.sum()) == len(entries.ids_N) == len(entries.logprobs_N):
        raise UsageError(f"the counts announce {int(counts_R.sum())} entries; there are {len(entries.ids_N)} ids and "
                         f"{len(entries.logprobs_N)} log-probabilities")
    if len(entries.ids_N) and not 0 <= int(entries.ids_N.min()) <= int(entries.ids_N.max()) < vocab_size:
        raise UsageError(f"token ids from {entries.ids_N.min()} to {entries.ids_N.max()} do not fit a vocabulary of "
                         f"{vocab_size}")
    # A boolean mask is filled row by row, which is the order of the flat list.
    filled_RK = np.arange(int(counts_R.max(initial=0))) < counts_R[:, None]
    ids_RK = np.full(filled_RK.shape, PADDING, np.int64)
    logprobs_RK = np.full(filled_RK.shape, -np.inf, np.float32)
    ids_RK[filled_RK], logprobs_RK[filled_RK] = entries.ids_N, entries.logprobs_N
    return torch.from_numpy(ids_RK), torch.from_numpy(logprobs_RK)


def _cat_shifts(targets: Sequence[SparseTarget]) -> Tensor | None:
    if all(t.topk_shift_R is None for t in targets):
        return None
    return torch.cat([torch.zeros_like(t.tail_mass_R) if t.topk_shift_R is None else t.topk_shift_R for t in targets])


def _cat(parts: Sequence[Tensor], fill: float) -> Tensor:
    width = max(p.shape[1] for p in parts)
    return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1]), value=fill) for p in parts])
