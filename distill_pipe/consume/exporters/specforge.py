"""SpecForge, EAGLE-3 offline (sgl-project/SpecForge 0.2, `runtime/data_plane/offline_reader.py` and
`algorithms/eagle3/data.py`).

    rows_0-2000/data_{i}.ckpt   torch.save: input_ids [S], loss_mask [S] int64,
                                hidden_state [1, S, H] behind the final norm, aux_hidden_state [1, S, 3H]
    vocab_mapping.pt            d2t and t2d of the draft's vocabulary, where one was asked for

The trainer multiplies `hidden_state` by lm_head, and shifts ids and target by one: index t pairs the auxiliary state of
t with token t+1, compares with the distribution at t+1, and weights by the mask at t. It zeroes the mask of the last
index itself. Its `vocab_mapping_path` takes `vocab_mapping.pt`; without one it counts tokens itself.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from distill_pipe.consume.exporters.draft_vocabulary import chosen_vocabulary, write_pickled_vocabulary
from distill_pipe.consume.exporters.files import numbered_file, save_pickle
from distill_pipe.consume.exporters.inventory import Inventory
from distill_pipe.consume.exporters.layout import Address, ExportOptions
from distill_pipe.consume.exporters.record import Record, Sample
from distill_pipe.consume.exporters.states import StatesLayout, paired_tokens
from distill_pipe.store.manifest import Run


class SpecForge(StatesLayout):
    """Layout of SpecForge's EAGLE-3 feature files."""

    name: ClassVar[str] = "specforge"
    aux_count: ClassVar[int | None] = 3
    takes_draft_vocab: ClassVar[bool] = True

    def __init__(self, root: Address, run: Run, options: ExportOptions) -> None:
        super().__init__(root, run, options)
        self._vocabulary = None if (size := options.draft_vocab) is None else chosen_vocabulary(root, run, size)

    def sample(self, record: Record) -> Sample:
        token_ids_S, loss_mask_S = paired_tokens(record)
        return {"input_ids": token_ids_S, "loss_mask": loss_mask_S, "hidden_state": self.last_SH(record)[None],
                "aux_hidden_state": self.aux_SW(record)[None]}

    def file_name(self, first: int) -> str:
        return numbered_file(first, 2000, "ckpt")

    def finish(self, folder: Path, inventory: Inventory) -> None:  # noqa: ARG002 - the files stand for themselves
        if self._vocabulary is not None:
            write_pickled_vocabulary(folder, self._vocabulary)

    def write(self, path: Path, samples: Sequence[Sample]) -> None:
        [sample] = samples
        save_pickle(path, sample)
