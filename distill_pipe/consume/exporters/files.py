"""What the files of an export are called, and how those that hold pickles are written.

`torch.save` is used here and nowhere else, for trainers that read nothing but pickles, and on dictionaries of plain
tensors only: `torch.load(..., weights_only=True)` reads them. What `distill-pipe` itself stores has no pickle in it.
"""

from pathlib import Path

import torch

from distill_pipe.consume.exporters.record import Sample


def save_pickle(path: Path, sample: Sample) -> None:
    """A dictionary of tensors as `torch.load` reads it. Views are cut out of what they view, which is saved whole."""
    # To a file of Python's, whose failures are OSErrors; torch's own become a RuntimeError.
    with open(path, "wb") as file:
        torch.save({name: tensor.clone() for name, tensor in sample.items()}, file)


def numbered_file(number: int, per_folder: int, suffix: str) -> str:
    """A name in one of many folders, since a folder of a million files is slow everywhere."""
    first = number // per_folder * per_folder
    return f"rows_{first}-{first + per_folder}/data_{number}.{suffix}"
