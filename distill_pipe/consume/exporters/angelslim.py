"""AngelSlim, EAGLE-3 offline (Tencent/AngelSlim 0.5, `train/data/dataset_builder/offline_dataset_builder.py`).

    rows_0-5000/data_{i}.ckpt   torch.save: input_ids [1, S], loss_mask [1, S] int64,
                                target_hiddens [1, S, H] behind the final norm, hidden_states [1, S, 3H]
    vocab_mapping.pt            d2t and t2d of the draft's vocabulary, where one was asked for

The trainer multiplies `target_hiddens` by lm_head and shifts as SpecForge does. It skips a file that it cannot read,
with a warning only, so files appear whole or not at all.
"""

from typing import ClassVar

import torch

from distill_pipe.consume.exporters.pickled import PickledLayout
from distill_pipe.consume.exporters.record import Record, Sample
from distill_pipe.consume.exporters.states import paired_tokens


class AngelSlim(PickledLayout):
    """Layout of AngelSlim's hidden-state files."""

    name: ClassVar[str] = "angelslim"
    suffix: ClassVar[str] = "ckpt"
    files_per_folder: ClassVar[int] = 5000
    aux_count: ClassVar[int | None] = 3
    takes_draft_vocab: ClassVar[bool] = True

    def sample(self, record: Record) -> Sample:
        token_ids_S, loss_mask_S = paired_tokens(record)
        return {"input_ids": token_ids_S[None], "loss_mask": loss_mask_S[None],
                "target_hiddens": self.last_SH(record)[None], "hidden_states": self.aux_SW(record)[None]}

    def item(self, sample: Sample) -> Sample:
        return sample | {"attention_mask": torch.ones_like(sample["input_ids"])}
