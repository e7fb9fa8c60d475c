"""A dataset in another trainer's files: every trace becomes a sample, in the order of the plan.

Files appear whole, and what a loader opens first (a manifest, an index) appears last. The same command continues an
export that stopped: it writes the files that are not there. `.distill-pipe.json` in the folder says what the export is,
and another one into the same folder is refused. The trade-off: most trainers want states uncompressed, so an export can
be many times the dataset; `adapters` yields the same dictionaries without it.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import msgspec

from distill_pipe.consume.exporters import DEFAULTS, ExportOptions, Layout, trainer_layout
from distill_pipe.consume.exporters.inventory import Inventory
from distill_pipe.errors import MismatchError, UsageError
from distill_pipe.store.disk import SCRATCH, storage_failures, whole_file
from distill_pipe.store.root import open_root

RECORD = ".distill-pipe.json"


class ExportRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an export is; `target`, a path, is no part of it."""

    trainer: str
    fingerprint: str
    layers: tuple[int, ...]
    dtype: str
    top_k: int | None
    seq_length: int
    draft_vocab: int | None
    split: str
    holdout_every: int


class ExportReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an export holds. `layers` are canonical, `layer_ids` the auxiliary ones of them in the trainer's numbering;
    `cut_traces` were longer than the trainer's sequences. `dropped_mass` is the mean probability outside the head, if
    that is lost."""

    folder: str
    trainer: str
    samples: int
    tokens: int
    bytes: int
    files_written: int
    files_kept: int
    layers: tuple[int, ...]
    layer_ids: tuple[int, ...]
    cut_traces: int
    dropped_mass: float | None
    notes: tuple[str, ...]


def export(root: str | os.PathLike[str], trainer: str, out: str | os.PathLike[str],
           options: ExportOptions = DEFAULTS, on_file: Callable[[int, int], None] | None = None) -> ExportReport:
    """Write the dataset at `root` into the folder `out` as `trainer` reads it.

    Args:
        on_file: called with how many samples are done, and of how many, whenever a file was written.

    Raises:
        UsageError: the trainer is unknown, the dataset lacks what it needs or is not complete, or `out` holds something
            else.
        MismatchError: `out` holds an export of another dataset or with other options.
        StorageFullError: no room is left; what was written stays, and the same call goes on.
        DamageError: the dataset is damaged.
    """
    folder = Path(out)
    inventory = Inventory(open_root(root), options.split, options.holdout_every)
    layout = trainer_layout(root, trainer, options)
    layout.require_inputs()
    with storage_failures(str(folder)):
        _claim(folder, _record(layout))
        written = _write(folder, layout, inventory, on_file)
        layout.finish(folder, inventory)
    return _report(folder, layout, inventory, written)


def _write(folder: Path, layout: Layout, inventory: Inventory, on_file: Callable[[int, int], None] | None) -> int:
    """Write the files of samples that are not there; how many those were."""
    size = layout.samples_per_file
    missing = {first for first in range(0, len(inventory), size) if not (folder / layout.file_name(first)).exists()}
    wanted = {n for first in missing for n in range(first, min(first + size, len(inventory)))}
    group = []
    for number, record in inventory.records(layout.layers, wanted):
        group.append(layout.sample(record))
        if number + 1 == len(inventory) or (number + 1) % size == 0:
            first = number + 1 - len(group)
            with whole_file(folder / layout.file_name(first)) as path:
                layout.write(path, group)
            group = []
            if on_file is not None:
                on_file(number + 1, len(inventory))
    return len(missing)


def _record(layout: Layout) -> ExportRecord:
    options = layout.options
    return ExportRecord(trainer=layout.name, fingerprint=layout.run.fingerprint, layers=layout.layers,
                        dtype=options.dtype, top_k=options.top_k, seq_length=options.seq_length,
                        draft_vocab=options.draft_vocab, split=options.split,
                        holdout_every=options.holdout_every)


def _claim(folder: Path, record: ExportRecord) -> None:
    """Make the folder this export's, or see that it is."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(folder)):
        raise UsageError(f"{folder}: an export is written to a local folder, since trainers read it from one")
    path = folder / RECORD
    if path.exists():
        try:
            stored = msgspec.json.decode(path.read_bytes(), type=ExportRecord)
        except msgspec.DecodeError as error:
            raise MismatchError(f"{path} cannot be read: {error}") from error
        differing = [f"{name}: stored {getattr(stored, name)}, given {getattr(record, name)}"
                     for name in record.__struct_fields__ if getattr(stored, name) != getattr(record, name)]
        if differing:
            raise MismatchError(f"{folder} holds another export ({'; '.join(differing)}); give another folder")
        return
    # A call that was killed before this point may have left a scratch file.
    if folder.exists() and (not folder.is_dir() or any(p.suffix != SCRATCH for p in folder.iterdir())):
        raise UsageError(f"{folder} is not empty and no export; give another folder")
    with whole_file(path) as scratch:
        scratch.write_bytes(msgspec.json.encode(record))


def _report(folder: Path, layout: Layout, inventory: Inventory, written: int) -> ExportReport:
    limit, files = layout.max_tokens, -(-len(inventory) // layout.samples_per_file)
    return ExportReport(
        folder=str(folder), trainer=layout.name, samples=len(inventory), tokens=int(inventory.lengths_N.sum()),
        bytes=sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()), files_written=written,
        files_kept=files - written, layers=layout.layers, layer_ids=tuple(layout.layer_ids),
        cut_traces=0 if limit is None else int((inventory.lengths_N > limit).sum()),
        dropped_mass=inventory.dropped_mass if layout.drops_tail else None, notes=layout.notes)
