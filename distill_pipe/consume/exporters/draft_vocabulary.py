"""A draft's vocabulary as trainers store it: `d2t` [D] int64, the target's id of each draft token less its own number,
and `t2d` [V] bool, whether a token is in it.

Chosen by the probability that the target gives each token, which `finalize` sums up; the trainers themselves count how
often a token was written, which is noisier for the rare ones.

Shapes: V target vocabulary, D draft vocabulary.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill_pipe.consume.exporters.files import save_pickle
from distill_pipe.consume.exporters.layout import Address
from distill_pipe.consume.vocabulary import DraftVocabulary
from distill_pipe.errors import UsageError
from distill_pipe.store.disk import whole_file
from distill_pipe.store.manifest import Run


def chosen_vocabulary(root: Address, run: Run, size: int) -> DraftVocabulary:
    """The `size` tokens of largest probability mass, as rising ids.

    Raises:
        UsageError: the size is out of range, or the dataset is not finalized.
    """
    vocab_size = run.spec.target.vocab_size
    if not 2 <= size <= vocab_size:
        raise UsageError(f"--draft-vocab {size} must be between 2 and {vocab_size}, the target's vocabulary")
    return DraftVocabulary.from_dataset(root, size)


def write_numpy_vocabulary(folder: Path, vocabulary: DraftVocabulary) -> None:
    """`d2t-{D}.npy` and `t2d-{D}.npy`."""
    for name, tensor in _stored(vocabulary).items():
        with whole_file(folder / f"{name}-{vocabulary.size}.npy") as path, open(path, "wb") as file:
            np.lib.format.write_array(file, tensor.numpy(), allow_pickle=False)  # type: ignore[no-untyped-call]


def write_pickled_vocabulary(folder: Path, vocabulary: DraftVocabulary) -> None:
    """`vocab_mapping.pt`, with both."""
    with whole_file(folder / "vocab_mapping.pt") as path:
        save_pickle(path, _stored(vocabulary))


def _stored(vocabulary: DraftVocabulary) -> dict[str, Tensor]:
    return {"d2t": vocabulary.d2t_D - torch.arange(vocabulary.size), "t2d": vocabulary.t2d_V >= 0}
