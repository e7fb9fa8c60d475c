"""NeMo Automodel, DSpark cache (NVIDIA-NeMo/Automodel 0.7, `components/datasets/llm/dspark_cache.py`).

Per sample of length S = `seq_length`: input_ids and loss_mask [S] int64, target_hidden_states [S, L*H],
target_last_hidden_states [S, H] behind the final norm. `target_weights.safetensors` holds the target's
`embed_tokens.weight` and `lm_head.weight`. The embeddings, as a layer, are -1.

All T tokens are given, unlike to the other trainers: a block draft needs the last one as a label. It reads states below
its anchor and targets before its labels alone, so the state of the last token, which is zero, is never used.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import msgspec

from distill_pipe.consume.exporters.automodel_cache import (
    DTYPE_NAMES,
    MASK_NOTE,
    SAMPLES_PER_SHARD,
    cache_file,
    target_folder,
    target_tables,
    write_cache_file,
    write_manifest,
)
from distill_pipe.consume.exporters.inventory import Inventory
from distill_pipe.consume.exporters.layout import Address, ExportOptions
from distill_pipe.consume.exporters.record import Record, Sample, padded
from distill_pipe.consume.exporters.states import StatesLayout
from distill_pipe.consume.tensor_file import save_tensors
from distill_pipe.errors import UsageError
from distill_pipe.store.disk import whole_file
from distill_pipe.store.manifest import Run


class _TargetConfig(msgspec.Struct, frozen=True):
    """What is taken from the target's config.json."""

    model_type: str


class AutomodelDspark(StatesLayout):
    """Layout of the DSpark cache."""

    name: ClassVar[str] = "automodel-dspark"
    samples_per_file: ClassVar[int] = SAMPLES_PER_SHARD
    takes_embeddings: ClassVar[bool] = True
    notes = (MASK_NOTE,)

    def __init__(self, root: Address, run: Run, options: ExportOptions) -> None:
        super().__init__(root, run, options)
        self.max_tokens = options.seq_length

    def sample(self, record: Record) -> Sample:
        length = self.options.seq_length
        return {"input_ids": padded(record.token_ids_T, length), "loss_mask": padded(record.loss_mask_T.long(), length),
                "target_hidden_states": padded(self.aux_SW(record), length),
                "target_last_hidden_states": padded(self.last_SH(record), length)}

    def file_name(self, first: int) -> str:
        return cache_file(first)

    def write(self, path: Path, samples: Sequence[Sample]) -> None:
        write_cache_file(path, samples)

    def require_inputs(self) -> None:
        _model_type(target_folder(self.options.target, self.name))

    def finish(self, folder: Path, inventory: Inventory) -> None:
        target, source = self.run.spec.target, target_folder(self.options.target, self.name)
        embedding_VH, head_VH = (table_VH.to(self.dtype) for table_VH in target_tables(source))
        with whole_file(folder / "target_weights.safetensors") as path:
            save_tensors(path, {"embed_tokens.weight": embedding_VH, "lm_head.weight": head_VH.clone()})
        write_manifest(folder, 1, {
            "target_model": target.name, "target_model_type": _model_type(source),
            "target_vocab_size": target.vocab_size, "hidden_size": target.hidden_size,
            "num_hidden_layers": target.num_layers, "seq_length": self.options.seq_length,
            "dtype": DTYPE_NAMES[self.options.dtype], "num_samples": len(inventory),
            "target_hidden_dim": target.hidden_size * len(self.aux), "target_last_hidden_dim": target.hidden_size,
            "target_layer_ids": self.layer_ids, "train_data_path": f"distill-pipe:{self.run.fingerprint}",
            "chat_template_sha256": target.chat_template_sha256 or "", "complete": True})


def _model_type(folder: Path) -> str:
    try:
        return msgspec.json.decode((folder / "config.json").read_bytes(), type=_TargetConfig).model_type
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"{folder}/config.json cannot be used: {error}") from error
