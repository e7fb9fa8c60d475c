"""ModelOpt offline (NVIDIA/Model-Optimizer 0.47, `modelopt/torch/speculative/eagle/utils.py`).

    rows_0-2000/data_{i}.pt   torch.save: input_ids [S], loss_mask [S] int64, hidden_states [S, H],
                              aux_hidden_states [S, L*H], hidden_states_prenorm (false)

The last state is given behind the final norm: every head takes that, while only some honour `hidden_states_prenorm`.
The trainer uses the stored mask with `answer_only_loss`; it weights the distribution at t by the mask at t.
Training looks for files in subfolders too; calibration of a quantised draft does not, and takes one of them.
"""

from typing import ClassVar

import torch

from distill_pipe.consume.exporters.pickled import PickledLayout
from distill_pipe.consume.exporters.record import Record, Sample
from distill_pipe.consume.exporters.states import paired_tokens

_IGNORED = -100


class ModelOpt(PickledLayout):
    """Layout of ModelOpt's dumped conversations."""

    name: ClassVar[str] = "modelopt"
    suffix: ClassVar[str] = "pt"

    def sample(self, record: Record) -> Sample:
        token_ids_S, loss_mask_S = paired_tokens(record)
        return {"input_ids": token_ids_S, "loss_mask": loss_mask_S, "hidden_states": self.last_SH(record),
                "aux_hidden_states": self.aux_SW(record), "hidden_states_prenorm": torch.tensor(False)}

    def item(self, sample: Sample) -> Sample:
        token_ids_S = sample["input_ids"]
        labels_S = torch.cat([token_ids_S[1:], torch.tensor([_IGNORED])])
        return {"input_ids": token_ids_S, "base_model_hidden_states": sample["hidden_states"],
                "aux_hidden_states": sample["aux_hidden_states"], "attention_mask": torch.ones_like(token_ids_S),
                "loss_mask": sample["loss_mask"], "labels": labels_S,
                "base_hidden_prenorm": sample["hidden_states_prenorm"]}
