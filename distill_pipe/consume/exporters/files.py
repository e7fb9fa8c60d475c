"""Files of an export: each appears whole under its name, or not at all.

`torch.save` is used here and nowhere else, for trainers that read nothing but pickles, and on dictionaries of plain
tensors only: `torch.load(..., weights_only=True)` reads them. What `distill-pipe` itself stores has no pickle in it.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from distill_pipe.consume.exporters.record import Sample

SCRATCH = ".part"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; moved to `path` when the body is done, gone when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden, and unlike anything that a loader looks for, in case the process is killed.
    scratch = path.parent / f".{uuid.uuid4().hex}{SCRATCH}"
    try:
        yield scratch
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def save_pickle(path: Path, sample: Sample) -> None:
    """A dictionary of tensors as `torch.load` reads it. Views are cut out of what they view, which is saved whole."""
    # To a file of Python's, whose failures are OSErrors; torch's own become a RuntimeError.
    with open(path, "wb") as file:
        torch.save({name: tensor.clone() for name, tensor in sample.items()}, file)


def numbered_file(number: int, per_folder: int, suffix: str) -> str:
    """A name in one of many folders, since a folder of a million files is slow everywhere."""
    first = number // per_folder * per_folder
    return f"rows_{first}-{first + per_folder}/data_{number}.{suffix}"
