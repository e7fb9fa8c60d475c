"""Layouts of one pickled dictionary per trace, read with `torch.load`, in folders of a few thousand files each."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from distill_pipe.consume.exporters.draft_vocabulary import chosen_vocabulary, write_pickled_vocabulary
from distill_pipe.consume.exporters.files import numbered_file, save_pickle
from distill_pipe.consume.exporters.inventory import Inventory
from distill_pipe.consume.exporters.layout import Address, ExportOptions
from distill_pipe.consume.exporters.record import Sample
from distill_pipe.consume.exporters.states import StatesLayout
from distill_pipe.store.manifest import Run


class PickledLayout(StatesLayout):
    """A sample is a file. Where a draft vocabulary was asked for, `vocab_mapping.pt` lies beside the folders."""

    suffix: ClassVar[str]
    files_per_folder: ClassVar[int] = 2000

    def __init__(self, root: Address, run: Run, options: ExportOptions) -> None:
        super().__init__(root, run, options)
        self._vocabulary = None if (size := options.draft_vocab) is None else chosen_vocabulary(root, run, size)

    def file_name(self, first: int) -> str:
        return numbered_file(first, self.files_per_folder, self.suffix)

    def write(self, path: Path, samples: Sequence[Sample]) -> None:
        [sample] = samples
        save_pickle(path, sample)

    def finish(self, folder: Path, inventory: Inventory) -> None:  # noqa: ARG002 - the files stand for themselves
        if self._vocabulary is not None:
            write_pickled_vocabulary(folder, self._vocabulary)
