"""A draft vocabulary smaller than the target's: which tokens a draft can say, and what they are called on either side.

A draft's lm_head is most of its cost, and few tokens are ever sampled, so drafts often speak a part of the target's
vocabulary (FR-Spec). The trade-off is final: what lies outside is never accepted. So the tokens are chosen by how much
probability the target gives them, which `finalize` sums up, and the loss keeps the mass outside in sight.

Shapes: V target vocabulary, D draft vocabulary.
"""

import os
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_pipe.errors import MismatchError, UsageError
from distill_pipe.store.finalize import SUCCESS, TOKENS, Success
from distill_pipe.store.manifest import decode_record, require_run
from distill_pipe.store.parquet import Limit, read_table
from distill_pipe.store.root import open_root
from distill_pipe.store.statistics import TOKEN_SCHEMA, draft_vocabulary


@dataclass(frozen=True, slots=True, eq=False)
class DraftVocabulary:
    """D tokens of V: `d2t_D` is the target's id of each draft token, `t2d_V` the draft's id of each target token or -1.

    Plain int64 ids. (Released EAGLE-3 drafts store `d2t` as the difference `d2t_D - arange(D)`, and `t2d` as a mask.)
    """

    d2t_D: Tensor
    t2d_V: Tensor

    @classmethod
    def from_ids(cls, ids_D: NDArray[np.integer] | Tensor, vocab_size: int) -> "DraftVocabulary":
        """The vocabulary of these target ids, whose order becomes the draft's.

        Raises:
            UsageError: an id is given twice or lies outside the vocabulary, or there is none.
        """
        d2t_D = torch.as_tensor(ids_D).to(torch.int64)
        if len(d2t_D) == 0 or len(set(d2t_D.tolist())) != len(d2t_D):
            raise UsageError("a draft vocabulary needs at least one token, and none of them twice")
        if int(d2t_D.min()) < 0 or int(d2t_D.max()) >= vocab_size:
            raise UsageError(f"draft vocabulary ids from {int(d2t_D.min())} to {int(d2t_D.max())} do not fit a target "
                             f"vocabulary of {vocab_size}")
        t2d_V = torch.full((vocab_size,), -1, dtype=torch.int64, device=d2t_D.device)
        t2d_V[d2t_D] = torch.arange(len(d2t_D), device=d2t_D.device)
        return cls(d2t_D, t2d_V)

    @classmethod
    def most_frequent(cls, counts_V: NDArray[np.generic] | Tensor, size: int) -> "DraftVocabulary":
        """The `size` tokens of largest count (or mass), as rising ids; of equal ones the lower id.

        Raises:
            UsageError: `size` is not between 1 and the vocabulary.
        """
        counts = torch.as_tensor(counts_V)
        if not 1 <= size <= len(counts):
            raise UsageError(f"a draft vocabulary of {size} tokens cannot be chosen from {len(counts)}")
        order_V = counts.to(torch.float64).argsort(descending=True, stable=True)
        return cls.from_ids(order_V[:size].sort().values, len(counts))

    @classmethod
    def from_dataset(cls, root: str | os.PathLike[str], size: int) -> "DraftVocabulary":
        """The `size` tokens to which the target gives most probability over all rows of a finalized dataset.

        Reads one small file. Where fewer tokens occur than are wanted, the lowest ids of the others fill up.

        Raises:
            UsageError: the dataset is not finalized, or `size` is not between 1 and the vocabulary.
            MismatchError: the statistics are those of another run.
            DamageError: the token table cannot be read.
        """
        place = open_root(root)
        run = require_run(place)
        vocab_size, record = run.spec.target.vocab_size, place.read(SUCCESS)
        if record is None or place.size(TOKENS) is None:
            raise UsageError(f"{root} has no token statistics: run `distill-pipe finalize {root}` first")
        if decode_record(record, Success, f"{root}/{SUCCESS}").fingerprint != run.fingerprint:
            raise MismatchError(f"{root} holds the token statistics of another run: finalize it again")
        with place.fetched(TOKENS) as path:
            table = read_table(path, TOKEN_SCHEMA, dict.fromkeys(TOKEN_SCHEMA.names, Limit(vocab_size)))
        chosen_V = np.zeros(vocab_size)
        # Any rank above the tokens that do not occur will do: at most `size` are chosen here.
        chosen_V[draft_vocabulary(table, size)] = 1
        return cls.most_frequent(chosen_V, size)

    @property
    def size(self) -> int:
        """D."""
        return len(self.d2t_D)

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.t2d_V)

    def to(self, device: torch.device | str) -> "DraftVocabulary":
        """The same vocabulary on another device."""
        return DraftVocabulary(self.d2t_D.to(device), self.t2d_V.to(device))
