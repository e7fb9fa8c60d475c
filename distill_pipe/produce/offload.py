"""From the engine's device to the host, beside the engine's next step.

On a GPU the copies go to pinned memory on a stream of their own: the engine's stream never waits for them, and whoever
reads the arrays waits for the copies first. On a CPU there is nothing to copy. The trade-off: torch keeps pinned blocks
for the next step, so as much pinned memory stays allocated as the largest backlog ever took.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_host(tensors: Sequence[Tensor]) -> tuple[list[NDArray[Any]], Callable[[], None] | None]:
    """Fresh tensors of one device as arrays, and what to call before reading them (None: read at once). bfloat16 comes
    as its bits, float16 as float32."""
    tensors = [_plain(t.detach()) for t in tensors]
    if not tensors or tensors[0].device.type == "cpu":
        return [_array(t) for t in tensors], None
    side = _side_stream(tensors[0].device)
    side.wait_stream(torch.cuda.current_stream(tensors[0].device))
    with torch.cuda.stream(side):
        copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        for tensor in tensors:
            # Its memory must not be given to the engine's stream before the copy is done.
            tensor.record_stream(side)
        # The thread that waits for it sleeps; by default it would spin on a core.
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call] # torch leaves it untyped
        done.record(side)
    return [_array(c) for c in copies], done.synchronize


def _plain(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16)
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _array(tensor: Tensor) -> NDArray[Any]:
    array = tensor.numpy()
    return array.view(np.uint16) if array.dtype == np.int16 else array


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch leaves it untyped
