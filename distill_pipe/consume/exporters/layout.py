"""What all trainers' layouts share: a dictionary of tensors per trace, and the files that hold them.

A layout makes the dictionary (`sample`), which both the exporter and the adapters use, and writes files of a fixed
number of samples. File names and numbers depend on the dataset alone, so an export that was interrupted is continued by
writing the files that are not there. Layers are canonical everywhere in this package; `layer_ids` says what the trainer
calls them.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import msgspec
import torch

from distill_pipe.consume.exporters.inventory import Inventory
from distill_pipe.consume.exporters.record import Record, Sample
from distill_pipe.consume.order import Split
from distill_pipe.errors import UsageError
from distill_pipe.store.manifest import Run

Address = str | os.PathLike[str]
Dtype = Literal["bf16", "f32", "fp8"]
_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


class ExportOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to export; not every trainer looks at all of it.

    `layers` are the auxiliary layers, canonical (all stored ones but the last when not given). `dtype` is that of
    hidden states. `top_k` head entries per row at most (all that are stored). `seq_length` is the length that
    trainers with fixed shapes pad and cut to, `draft_vocab` the size of the draft's vocabulary (the target's when not
    given), and `target` the target's folder, for those that want its embedding or head. `split` and `holdout_every`
    are the reader's: a draft that is to be evaluated on held-out traces must not be given them. Adapters take both from
    their reader.
    """

    layers: tuple[int, ...] | None = None
    dtype: Dtype = "bf16"
    top_k: int | None = None
    seq_length: int = 2048
    draft_vocab: int | None = None
    target: Path | None = None
    split: Split = "all"
    holdout_every: int = 10


DEFAULTS = ExportOptions()


class Layout:
    """One trainer's dictionaries and files. `layers` are those that are read of the dataset.

    Raises:
        UsageError: the dataset lacks what the trainer needs; says what to add at `generate`.
    """

    name: ClassVar[str]
    samples_per_file: ClassVar[int] = 1
    dtypes: ClassVar[tuple[Dtype, ...]] = ("bf16", "f32")
    takes_draft_vocab: ClassVar[bool] = False
    # The most tokens of a trace that a sample holds, where there is such a limit.
    max_tokens: int | None = None
    # What the user has to know about the files, said once.
    notes: tuple[str, ...] = ()
    # True where the mass outside the head gets lost.
    drops_tail: ClassVar[bool] = False

    def __init__(self, root: Address, run: Run, options: ExportOptions) -> None:
        if options.dtype not in self.dtypes:
            raise UsageError(f"{self.name} takes hidden states as {' or '.join(self.dtypes)}, not {options.dtype}")
        if options.draft_vocab is not None and not self.takes_draft_vocab:
            raise UsageError(f"{self.name} has no use for --draft-vocab")
        self.root, self.run, self.options = root, run, options
        self.dtype = _DTYPES.get(options.dtype, torch.bfloat16)
        self.layers: tuple[int, ...] = ()

    @property
    def layer_ids(self) -> list[int]:
        """The auxiliary layers in the trainer's numbering."""
        return []

    def sample(self, record: Record) -> Sample:
        """The tensors of one trace, as they stand in the file."""
        raise NotImplementedError

    def item(self, sample: Sample) -> Sample:
        """What the trainer's own dataset makes of a stored sample."""
        return sample

    def file_name(self, first: int) -> str:
        """The file, relative to the export, whose first sample has this number."""
        raise NotImplementedError

    def write(self, path: Path, samples: Sequence[Sample]) -> None:
        """Write a whole file; the caller gives it its name."""
        raise NotImplementedError

    def require_inputs(self) -> None:
        """Raises UsageError unless what only the files need, and no sample, is at hand; nothing is written before."""

    def finish(self, folder: Path, inventory: Inventory) -> None:
        """Write what a loader needs beside the samples, once they are all there."""


def aux_layers(root: Address, run: Run, options: ExportOptions, trainer: str, number: int | None = None
               ) -> tuple[int, ...]:
    """The auxiliary layers of an export, rising: those asked for, or all stored ones but the last.

    Raises:
        UsageError: they are not stored, or not as many as the trainer takes.
    """
    stored, last = run.spec.capture.layers, run.spec.target.num_layers
    layers = tuple(n for n in stored if n != last) if options.layers is None else tuple(sorted(set(options.layers)))
    if last in layers:
        raise UsageError(f"layer {last} is the last of {run.spec.target.name} and is exported as the last state; leave "
                         "it out of --layers")
    absent = [n for n in layers if n not in stored]
    if absent or not layers or (options.layers is None and number is not None and len(layers) < number):
        wanted = "the auxiliary layers" if not absent else f"layers {_listed(absent)}"
        raise UsageError(f"{root} does not store {wanted} that {trainer} needs (it stores {_listed(stored)}): run "
                         f"generate with --layers {_example(layers, last, number)}")
    if number is not None and len(layers) != number:
        raise UsageError(f"{trainer} takes exactly {number} auxiliary layers, not {_listed(layers)}: name them, for "
                         f"example --layers {','.join(map(str, layers[:number]))}")
    return layers


def last_layer(root: Address, run: Run, trainer: str) -> int:
    """The canonical number of the state before the final norm.

    Raises:
        UsageError: it is not stored.
    """
    stored, last = run.spec.capture.layers, run.spec.target.num_layers
    if last not in stored:
        raise UsageError(f"{root} does not store layer {last}, the last state, which {trainer} needs: run generate "
                         f"with --layers {','.join(map(str, (*stored, last)))}")
    return last


def head_entries(root: Address, run: Run, options: ExportOptions) -> int:
    """How many head entries of a row are exported.

    Raises:
        UsageError: more are asked for than are stored.
    """
    stored = run.spec.capture.top_k
    if options.top_k is not None and not 1 <= options.top_k <= stored:
        raise UsageError(f"{root} stores {stored} head entries per row, not {options.top_k}: run generate with --top-k "
                         f"{options.top_k}, or export at most {stored}")
    return options.top_k or stored


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _example(layers: Sequence[int], last: int, number: int | None) -> str:
    """A choice that would do: the layers wanted and the last, or the usual low, middle and high ones."""
    if not layers or (number is not None and len(layers) < number):
        layers = sorted({min(2, last), last // 2, max(last - 3, 0)})
    return ",".join(map(str, (*layers, last)))
