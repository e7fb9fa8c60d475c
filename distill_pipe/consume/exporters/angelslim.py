"""AngelSlim, EAGLE-3 offline (Tencent/AngelSlim 0.5, `train/data/dataset_builder/offline_dataset_builder.py`).

    rows_0-5000/data_{i}.ckpt   torch.save: input_ids [1, S], loss_mask [1, S] int64,
                                target_hiddens [1, S, H] behind the final norm, hidden_states [1, S, 3H]
    vocab_mapping.pt            d2t and t2d of the draft's vocabulary, where one was asked for

The trainer multiplies `target_hiddens` by lm_head and shifts as SpecForge does. It skips a file that it cannot read,
with a warning only, so files appear whole or not at all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch

from distill_pipe.consume.exporters.draft_vocabulary import chosen_vocabulary, write_pickled_vocabulary
from distill_pipe.consume.exporters.files import numbered_file, save_pickle
from distill_pipe.consume.exporters.inventory import Inventory
from distill_pipe.consume.exporters.layout import Address, ExportOptions
from distill_pipe.consume.exporters.record import Record, Sample
from distill_pipe.consume.exporters.states import StatesLayout, paired_tokens
from distill_pipe.store.manifest import Run


class AngelSlim(StatesLayout):
    """Layout of AngelSlim's hidden-state files."""

    name: ClassVar[str] = "angelslim"
    aux_count: ClassVar[int | None] = 3
    takes_draft_vocab: ClassVar[bool] = True

    def __init__(self, root: Address, run: Run, options: ExportOptions) -> None:
        super().__init__(root, run, options)
        self._vocabulary = None if (size := options.draft_vocab) is None else chosen_vocabulary(root, run, size)

    def sample(self, record: Record) -> Sample:
        token_ids_S, loss_mask_S = paired_tokens(record)
        return {"input_ids": token_ids_S[None], "loss_mask": loss_mask_S[None],
                "target_hiddens": self.last_SH(record)[None], "hidden_states": self.aux_SW(record)[None]}

    def item(self, sample: Sample) -> Sample:
        return sample | {"attention_mask": torch.ones_like(sample["input_ids"])}

    def file_name(self, first: int) -> str:
        return numbered_file(first, 5000, "ckpt")

    def finish(self, folder: Path, inventory: Inventory) -> None:  # noqa: ARG002 - the files stand for themselves
        if self._vocabulary is not None:
            write_pickled_vocabulary(folder, self._vocabulary)

    def write(self, path: Path, samples: Sequence[Sample]) -> None:
        [sample] = samples
        save_pickle(path, sample)
