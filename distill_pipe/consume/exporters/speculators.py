"""speculators (vllm-project/speculators 0.9, `train/data.py`; hs-connectors 0.9, `transfer.py`).

    hidden_states/hs_{i}.safetensors   token_ids [S] int64, hidden_states [S, L+1, H]; the last slot is the last layer
    data-*.arrow and two JSON files    a dataset on disk, torch format: input_ids, loss_mask, seq_len
    d2t-{D}.npy, t2d-{D}.npy           the draft's vocabulary, where one was asked for

The trainer applies the final norm itself, so the last state is given **before** it, and its layer ids count layers as
vLLM does, which are the canonical numbers. Its loss at position t compares with the last state at t and is weighted by
the mask at t. With `fp8` a file holds float8 E4M3 states and `hidden_states_scales` [S, 1, 1], one float32 per token
over all layers, as `FP8Transfer` reads them: 2.3 % relative error of the largest layer, more of the others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distill_pipe.consume.exporters.arrow_folder import write_state, write_stream
from distill_pipe.consume.exporters.draft_vocabulary import chosen_vocabulary, write_numpy_vocabulary
from distill_pipe.consume.exporters.inventory import Inventory
from distill_pipe.consume.exporters.layout import Address, Dtype, ExportOptions, Layout, aux_layers, last_layer
from distill_pipe.consume.exporters.record import Record, Sample
from distill_pipe.consume.exporters.states import paired_tokens
from distill_pipe.consume.tensor_file import save_tensors
from distill_pipe.store.disk import whole_file
from distill_pipe.store.manifest import Run
from distill_pipe.store.trace import Trace

_SCALES = "hidden_states_scales"
_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.int8())), ("seq_len", pa.int32())])
_STREAM = "data-00000-of-00001.arrow"
_E4M3_MAX = 448.0


class Speculators(Layout):
    """Layout of speculators' offline training."""

    name: ClassVar[str] = "speculators"
    dtypes: ClassVar[tuple[Dtype, ...]] = ("bf16", "f32", "fp8")
    takes_draft_vocab: ClassVar[bool] = True

    def __init__(self, root: Address, run: Run, options: ExportOptions) -> None:
        super().__init__(root, run, options)
        self.aux = aux_layers(root, run, options, self.name)
        self.layers = (*self.aux, last_layer(root, run, self.name))
        self._vocabulary = None if (size := options.draft_vocab) is None else chosen_vocabulary(root, run, size)
        if self._vocabulary is not None:
            self.notes = (f"give the trainer d2t-{size}.npy and t2d-{size}.npy as --d2t-path and --t2d-path",)

    @property
    def layer_ids(self) -> list[int]:
        return list(self.aux)

    def sample(self, record: Record) -> Sample:
        token_ids_S, loss_mask_S = paired_tokens(record)
        states_SLH = record.states_SLH(self.layers, self.dtype)
        sample = {"token_ids": token_ids_S, "hidden_states": states_SLH, "loss_mask": loss_mask_S}
        if self.options.dtype == "fp8":
            sample["hidden_states"], sample[_SCALES] = _to_fp8(states_SLH)
        return sample

    def item(self, sample: Sample) -> Sample:
        states_SLH, token_ids_S = sample["hidden_states"], sample["token_ids"]
        if _SCALES in sample:
            states_SLH = states_SLH.to(self.dtype) * sample[_SCALES].to(self.dtype)
        return {"hidden_states": states_SLH[:, :-1].flatten(1), "input_ids": token_ids_S,
                "verifier_last_hidden_states": states_SLH[:, -1], "loss_mask": sample["loss_mask"],
                "lengths": torch.tensor([len(token_ids_S)]), "position_ids": torch.arange(len(token_ids_S))}

    def file_name(self, first: int) -> str:
        return f"hidden_states/hs_{first}.safetensors"

    def write(self, path: Path, samples: Sequence[Sample]) -> None:
        [sample] = samples
        save_tensors(path, {name: tensor for name, tensor in sample.items() if name != "loss_mask"})

    def finish(self, folder: Path, inventory: Inventory) -> None:
        if self._vocabulary is not None:
            write_numpy_vocabulary(folder, self._vocabulary)
        with whole_file(folder / _STREAM) as path:
            write_stream(path, _SCHEMA, map(_paired, inventory.traces()))
        write_state(folder, [_STREAM], inventory.run.fingerprint, "torch")


def _to_fp8(states_SLH: Tensor) -> tuple[Tensor, Tensor]:
    wide_SLH = states_SLH.float()
    scale_S11 = (wide_SLH.abs().amax((1, 2), keepdim=True) / _E4M3_MAX).clamp(min=1e-12)
    return (wide_SLH / scale_S11).to(torch.float8_e4m3fn), scale_S11


def _paired(traces: Sequence[Trace]) -> pa.Table:
    """The tokens that have a state: all of a trace but the last."""
    columns = [[t.token_ids_T[:-1] for t in traces], [t.loss_mask_T[:-1].astype(np.int8) for t in traces],
               [t.num_tokens - 1 for t in traces]]
    return pa.table([pa.array(c, field.type) for c, field in zip(columns, _SCHEMA, strict=True)], _SCHEMA)
