"""Other trainers' dictionaries straight from the shards: what their own datasets would yield.

    layout = trainer_layout("dataset", "speculators")
    reader = ShardReader("dataset", layers=layout.layers, batch_tokens=8192, seed=0)
    loader = DataLoader(TrainerSamples(reader, layout), batch_size=8, collate_fn=CollateFn(8192, hidden_size))

Nothing is written. The collating function is the trainer's; order, epochs and ranks are the reader's; the tensors are
those of `export`, bit for bit. Names, shapes and dtypes stand in the trainer's module of
`distill_pipe.consume.exporters`.
"""

from collections.abc import Iterable, Iterator

from torch.utils.data import IterableDataset

from distill_pipe.consume.batch import Batch
from distill_pipe.consume.exporters import ExportOptions, Layout, trainer_layout
from distill_pipe.consume.exporters.record import Sample, batch_records

__all__ = ["ExportOptions", "TrainerSamples", "trainer_layout"]


class TrainerSamples(IterableDataset[Sample]):
    """One dictionary per trace, as the trainer's own dataset yields it, in the order of the batches.

    Args:
        batches: a `ShardReader` that reads `layout.layers`.
        layout: of `trainer_layout`.
    """

    def __init__(self, batches: Iterable[Batch], layout: Layout) -> None:
        self._batches, self._layout = batches, layout

    def __iter__(self) -> Iterator[Sample]:
        for batch in self._batches:
            for record in batch_records(batch):
                yield self._layout.item(self._layout.sample(record))
