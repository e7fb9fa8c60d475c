"""Axolotl's knowledge distillation (axolotl-ai-cloud/axolotl 0.19, `integrations/kd/collator.py`, `kernels/liger.py`).

An Arrow folder that `datasets.load_from_disk` reads, one row per trace, with the columns that axolotl's own
preparation makes, so that neither its chat template nor its tokenizer comes into play:

    input_ids, attention_mask, labels [T]         labels are -100 where a token is not supervised
    target_token_ids, target_logprobs [T][K]      the head of the distribution of token t+1, at index t
    target_mask [T][K]                            1 where there is such an entry

Point a dataset of `type: axolotl.integrations.kd.chat_template` at the folder; tokenised rows are passed on as they
are.

What is lost: the log-probabilities are renormalised over the head, as the trainer's loss takes for granted, so the tail
mass is given to the head. The optimum of such a loss is not p.
"""

from typing import ClassVar

import torch

from distill_pipe.consume.exporters.record import Record, Sample, at_positions
from distill_pipe.consume.exporters.token_rows import IGNORED, TokenRows, head_of

# What the trainer's collator puts where there is no entry; its losses must not meet -inf.
_NO_ENTRY = -1e9


class Axolotl(TokenRows):
    """Layout of axolotl's tokenised rows."""

    name: ClassVar[str] = "axolotl"

    def sample(self, record: Record) -> Sample:
        length = record.num_tokens
        ids_RK, logprobs_RK, held_RK = head_of(record, self.top_k)
        logprobs_RK = torch.where(held_RK, logprobs_RK, -torch.inf).log_softmax(1)
        mask_TK = at_positions(held_RK, record.positions_R, length)
        logprobs_TK = at_positions(torch.where(held_RK, logprobs_RK, 0.0), record.positions_R, length)
        return {"input_ids": record.token_ids_T, "attention_mask": torch.ones(length, dtype=torch.int8),
                "labels": torch.where(record.loss_mask_T, record.token_ids_T, IGNORED),
                "target_token_ids": at_positions(ids_RK, record.positions_R, length),
                "target_logprobs": torch.where(mask_TK, logprobs_TK, _NO_ENTRY), "target_mask": mask_TK.to(torch.int8)}
