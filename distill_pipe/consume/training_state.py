"""A training that can be continued: weights, optimiser and place, in one safetensors file that is replaced as a whole.

Everything is kept in the precision it is computed in, so a continued training is the uninterrupted one bit for bit on
the same machine. The trade-off for one file without pickles: tensors are named by hand, and only AdamW is known.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from distill_pipe.consume.acceptance import Acceptance
from distill_pipe.errors import MismatchError
from distill_pipe.store.disk import storage_failures, whole_file

FILE = "training.safetensors"
_KEY = "training"


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a training stands: steps done, the epoch, and how many batches of it are done."""

    step: int = 0
    epoch: int = 0
    batches: int = 0
    rows: int = 0
    seconds: float = 0.0


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in the file beside the tensors. `identity` is what must not change between calls; `reader` is the
    reader's own state."""

    place: Place
    identity: str
    reader: dict[str, object]
    losses: tuple[float, ...]
    before: tuple[Acceptance, ...]


def save_training(folder: Path, saved: Saved, weights: Mapping[str, Tensor], optimizer: torch.optim.AdamW) -> None:
    """Replace the saved training. A crash, or a full disk (StorageFullError), leaves the one before."""
    from distill_pipe.consume.tensor_file import save_tensors

    tensors = {f"weight.{name}": weight.detach() for name, weight in weights.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    with storage_failures(str(folder)), whole_file(folder / FILE) as scratch:
        save_tensors(scratch, tensors, {_KEY: msgspec.json.encode(saved).decode()})


def restore_training(folder: Path, identity: str, weights: Mapping[str, Tensor],
                     optimizer: torch.optim.AdamW) -> Saved | None:
    """Put a saved training back into weights and optimiser; None where there is none.

    Raises:
        MismatchError: it was started with other settings or on other data.
    """
    from safetensors import safe_open

    if not (folder / FILE).exists():
        return None
    with safe_open(folder / FILE, framework="pt") as file:
        saved = msgspec.json.decode(file.metadata()[_KEY], type=Saved)
        if saved.identity != identity:
            raise MismatchError(f"{folder / FILE} is a training with other settings or other data; finish it as it was "
                                "started, delete the file, or choose another --out")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[f"weight.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, part = name.split(".")
            state.setdefault(int(index), {})[part] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return saved


def drop_training(folder: Path) -> None:
    """Forget the saved training."""
    (folder / FILE).unlink(missing_ok=True)
