"""DeepSpec's target cache, version 2 (deepseek-ai/DeepSpec, `deepspec/data/target_cache_dataset.py`).

    shard-00000.bin   per sample, one after the other: input_ids int32 [S], attention_mask and loss_mask uint8 [S],
                      target_hidden_states bf16 [S, L*H], target_last_hidden_states bf16 [S, H] behind the final norm
    samples.idx       56 bytes per sample: number, shard, S, and the offset of each of the five
    manifest.json     written last

The trainer compares `target_model_name_or_path` and the layer ids with its own configuration and numbers layers from 0,
the embeddings -1. EAGLE-3 there takes five layers. Block drafts lose one label per trace, since a sample ends with the
last token that has a state: EAGLE-3 would train on whatever stood behind it.
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import msgspec
import torch

from distill_pipe.consume.exporters.inventory import Inventory
from distill_pipe.consume.exporters.layout import Address, Dtype, ExportOptions
from distill_pipe.consume.exporters.record import Record, Sample
from distill_pipe.consume.exporters.states import StatesLayout, paired_tokens
from distill_pipe.store.disk import whole_file
from distill_pipe.store.manifest import Run

_INDEX = struct.Struct("<QIIQQQQQ")


class DeepSpec(StatesLayout):
    """Layout of DeepSpec's cache."""

    name: ClassVar[str] = "deepspec"
    samples_per_file: ClassVar[int] = 16
    dtypes: ClassVar[tuple[Dtype, ...]] = ("bf16",)
    takes_embeddings: ClassVar[bool] = True

    def __init__(self, root: Address, run: Run, options: ExportOptions) -> None:
        super().__init__(root, run, options)
        self._target = run.spec.target.name if options.target is None else str(options.target)
        self.notes = (f"the trainer's model.target_model_name_or_path has to read {self._target}; --target changes it",)

    def sample(self, record: Record) -> Sample:
        token_ids_S, loss_mask_S = paired_tokens(record)
        return {"input_ids": token_ids_S.int(), "attention_mask": torch.ones_like(loss_mask_S, dtype=torch.uint8),
                "loss_mask": loss_mask_S.to(torch.uint8), "target_hidden_states": self.aux_SW(record),
                "target_last_hidden_states": self.last_SH(record)}

    def item(self, sample: Sample) -> Sample:
        return {name: tensor for name, tensor in sample.items() if name != "attention_mask"}

    def file_name(self, first: int) -> str:
        return f"shard-{first // self.samples_per_file:05d}.bin"

    def write(self, path: Path, samples: Sequence[Sample]) -> None:
        with open(path, "wb") as file:
            for sample in samples:
                for tensor in sample.values():
                    file.write(tensor.contiguous().view(torch.uint8).numpy().data)

    def finish(self, folder: Path, inventory: Inventory) -> None:
        with whole_file(folder / "samples.idx") as path, open(path, "wb") as file:
            end = 0
            for number, tokens in enumerate(inventory.lengths_N.tolist()):
                start = 0 if number % self.samples_per_file == 0 else end
                positions, *edges = self._edges(start, tokens - 1)
                file.write(_INDEX.pack(number, number // self.samples_per_file, positions, *edges[:-1]))
                end = edges[-1]
        with whole_file(folder / "manifest.json") as path:
            path.write_bytes(msgspec.json.encode(self._manifest(len(inventory))))

    def _edges(self, start: int, positions: int) -> list[int]:
        """S, the offsets of a sample's five tensors, and its end."""
        hidden = self.run.spec.target.hidden_size
        edges = [start]
        for size in (4, 1, 1, 2 * len(self.aux) * hidden, 2 * hidden):
            edges.append(edges[-1] + positions * size)
        return [positions, *edges]

    def _manifest(self, samples: int) -> dict[str, object]:
        shards = [{"shard_id": i, "file_name": self.file_name(i * self.samples_per_file)}
                  for i in range(-(-samples // self.samples_per_file))]
        return {"version": 2, "num_samples": samples, "num_shards": len(shards), "target_layer_ids": self.layer_ids,
                "hidden_dtype": "bfloat16", "token_dtype": "int32", "mask_dtype": "uint8",
                "index_record_size": _INDEX.size, "hidden_size": self.run.spec.target.hidden_size, "shards": shards,
                "target_model_name_or_path": self._target}
