"""One sequence and its supervision, in memory: the one type that produce and consume share.

Alignment, stated once: **row r supervises position t = `positions_R[r]` and is the target's distribution of token t+1
given tokens 0..t.** Rows exist where `loss_mask_T[t + 1]` is set. Hidden states exist for positions 0..T-2: the last
token has no successor, so nothing is ever learnt from its state.

A trace is checked when it is made, so that whatever holds one may trust it. The trade-off is one pass over the arrays
per trace, which is nothing beside making them.

Shapes: T tokens, R supervised rows, N flat entries (head or tail of all rows), H hidden size.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from distill_pipe.errors import CaptureError, NotFiniteError

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Tokens, loss mask, sparse target distribution and hidden states of one prompt with its response.

    Log-probabilities are natural and refer to the raw logits (temperature 1). `topk_*_N` hold `topk_counts_R[r]`
    entries for row r in descending probability, `tail_*_N` hold `tail_counts_R[r]` samples of the mass outside the
    head, each of weight `tail_mass_R[r] / tail_counts_R[r]`. `hidden` maps a canonical layer to a `[T-1, H]` array:
    float32 values, or bfloat16 bits as uint16.

    Raises:
        CaptureError: a shape, an order or a value cannot be right.
        NotFiniteError: a value is NaN or infinite.
    """

    ordinal: int
    prompt_id: str
    domain: str | None
    finish_reason: str
    token_ids_T: Int32
    loss_mask_T: NDArray[np.bool_]
    logsumexp_R: Float32
    tail_mass_R: Float32
    next_logprob_R: Float32
    topk_counts_R: Int32
    topk_ids_N: Int32
    topk_logprobs_N: Float32
    tail_counts_R: Int32
    tail_ids_N: Int32
    tail_logprobs_N: Float32
    hidden: dict[int, NDArray[np.float32] | NDArray[np.uint16]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_shapes()
        self._check_values()
        self._check_head()
        self._check_hidden()

    @property
    def positions_R(self) -> NDArray[np.int64]:  # noqa: N802 - a shape, as in the fields beside it
        """The position t that each row supervises."""
        return np.flatnonzero(self.loss_mask_T[1:])

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)

    @property
    def num_rows(self) -> int:
        return len(self.logsumexp_R)

    def _check_shapes(self) -> None:
        rows = int(np.count_nonzero(self.loss_mask_T[1:]))
        expected = {
            "loss_mask": (len(self.loss_mask_T), self.num_tokens),
            "logsumexp": (len(self.logsumexp_R), rows),
            "tail_mass": (len(self.tail_mass_R), rows),
            "next_logprob": (len(self.next_logprob_R), rows),
            "topk_counts": (len(self.topk_counts_R), rows),
            "tail_counts": (len(self.tail_counts_R), rows),
            "topk_ids": (len(self.topk_ids_N), int(self.topk_counts_R.sum())),
            "topk_logprobs": (len(self.topk_logprobs_N), int(self.topk_counts_R.sum())),
            "tail_ids": (len(self.tail_ids_N), int(self.tail_counts_R.sum())),
            "tail_logprobs": (len(self.tail_logprobs_N), int(self.tail_counts_R.sum())),
        }
        expected |= {f"layer {n}": (len(h), self.num_tokens - 1) for n, h in self.hidden.items()}
        for name, (found, wanted) in expected.items():
            if found != wanted:
                raise CaptureError(f"prompt {self.ordinal}: {name} has {found} entries, expected {wanted}")
        if rows == 0:
            raise CaptureError(f"prompt {self.ordinal}: no token is supervised (the loss mask is empty)")
        if bool(self.loss_mask_T[0]):
            raise CaptureError(f"prompt {self.ordinal}: token 0 is marked as supervised, but nothing predicts it")

    def _check_values(self) -> None:
        for name in ("logsumexp_R", "tail_mass_R", "next_logprob_R", "topk_logprobs_N", "tail_logprobs_N"):
            bad = ~np.isfinite(getattr(self, name))
            if bad.any():
                raise NotFiniteError(f"prompt {self.ordinal}: {bad.sum()} values of {name} are not finite, "
                                     f"the first at entry {int(np.flatnonzero(bad)[0])}")
        if ((self.tail_mass_R < 0) | (self.tail_mass_R > 1)).any():
            raise CaptureError(f"prompt {self.ordinal}: a tail mass lies outside [0, 1]")
        for ids in (self.topk_ids_N, self.tail_ids_N, self.token_ids_T):
            if (ids < 0).any():
                raise CaptureError(f"prompt {self.ordinal}: a token id is negative")

    def _check_head(self) -> None:
        if (self.topk_counts_R < 1).any():
            raise CaptureError(f"prompt {self.ordinal}: a row has no head entry")
        if (self.tail_counts_R < 0).any():
            raise CaptureError(f"prompt {self.ordinal}: a row has a negative number of tail samples")
        rising = np.diff(self.topk_logprobs_N) > 0
        starts_N = np.cumsum(self.topk_counts_R)[:-1] - 1
        rising[starts_N] = False
        if rising.any():
            raise CaptureError(f"prompt {self.ordinal}: head log-probabilities are not in descending order")

    def _check_hidden(self) -> None:
        for layer, hidden_TH in self.hidden.items():
            bad_rows = nonfinite_rows(hidden_TH)
            if len(bad_rows):
                raise nonfinite_layer(self.ordinal, layer, bad_rows)


def nonfinite_layer(ordinal: int, layer: int, bad_rows: NDArray[np.int64]) -> NotFiniteError:
    """The error of a trace whose states of a layer are not finite at these positions."""
    return NotFiniteError(f"prompt {ordinal}: layer {layer} is not finite at {len(bad_rows)} positions, the first at "
                          f"position {bad_rows[0]}")


def nonfinite_rows(hidden_TH: NDArray[np.float32] | NDArray[np.uint16]) -> NDArray[np.int64]:
    """Positions whose state holds NaN or Inf; bfloat16 bits are non-finite when all 8 exponent bits are set."""
    bf16 = hidden_TH.dtype == np.uint16
    bad_TH = (hidden_TH.view(np.uint16) & 0x7F80) == 0x7F80 if bf16 else ~np.isfinite(hidden_TH)
    return np.flatnonzero(bad_TH.any(axis=1))
