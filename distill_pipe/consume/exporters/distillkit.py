"""DistillKit's offline rows (arcee-ai/DistillKit, `compression/compressor.py`, `trainer.py`, `pack_logits.py`).

An Arrow folder for `dataset.train_dataset.disk_path` or `distillkit-pack-logits`, one row per trace, uncompressed:

    input_ids, attention_mask, labels [T]
    token_ids, top_values [T][K]     the head of the distribution of token t+1, at index t: ids, log-probabilities

The trainer compares index t wherever `labels[t]` is not -100, so labels mark the positions that have a row, and not the
tokens that are supervised. Its cross entropy, which shifts labels by one, thereby trains on the token at each such
position: the last token of a prompt instead of the last one of the response. Rows of its own compressed layout are
not written: its recommended setting is off by 1.7 nats per entry on real heads.

What is lost: `missing_probability_handling: zero` renormalises over the head; `symmetric_uniform` spreads the tail mass
evenly over all other tokens. Log-probabilities are given as they are, never renormalised here. No hidden states.
"""

import math
from typing import ClassVar

import torch

from distill_pipe.consume.exporters.record import Record, Sample, at_positions
from distill_pipe.consume.exporters.token_rows import IGNORED, TokenRows, head_of

# As good as no probability, and finite: the trainer multiplies exp(x) by x.
_NO_ENTRY = -100.0


class DistillKit(TokenRows):
    """Layout of DistillKit's raw top-k rows."""

    name: ClassVar[str] = "distillkit"

    def sample(self, record: Record) -> Sample:
        length, positions_R = record.num_tokens, record.positions_R
        ids_RK, logprobs_RK, held_RK = head_of(record, self.top_k)
        row_T = at_positions(torch.ones_like(positions_R, dtype=torch.bool), positions_R, length)
        # Where nothing is compared: half of the mass, evenly. All of it would be NaN under `symmetric_uniform`, which
        # takes the log of what is missing before it looks at the mask.
        values_TK = torch.full((length, self.top_k), -math.log(2 * self.top_k))
        values_TK[positions_R] = torch.where(held_RK, logprobs_RK, _NO_ENTRY)
        ids_TK = torch.arange(self.top_k).expand(length, -1).clone()
        ids_TK[positions_R] = ids_RK
        return {"input_ids": record.token_ids_T, "attention_mask": torch.ones(length, dtype=torch.int8),
                "labels": torch.where(row_T, record.token_ids_T, IGNORED), "token_ids": ids_TK,
                "top_values": values_TK}
