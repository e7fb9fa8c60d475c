"""Sums over data-parallel ranks, such that the loss is that of all ranks' rows as one batch.

Each rank has other rows, and other numbers of them. With a process group, sums and weights are added up over the ranks
before they are divided, so every rank reports the loss and the alpha of the union, and the hybrid loss takes its weight
from them. The gradient is scaled by the number of ranks, because DDP and FSDP divide by it: they take the mean over
ranks of what each rank contributes, and the sum is what is wanted. The trade-off: it is right for them alone. Whoever
adds gradients up himself has to divide by the number of ranks.

`join_group`, `join_torchrun` and `leave_group` are for processes on CPUs (gloo), such as tests; a trainer has its own
group.
"""

import gc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def sum_over(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The values added up over the ranks of a group, as each rank's own; without a group, as they are."""
    if group is None:
        return values
    run: Callable[..., Tensor] = _SumOver.apply
    if torch.compiler.is_compiling():
        run = torch.compiler.disable(run)  # type: ignore[no-untyped-call]
    return run(values, group)


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.ranks = dist.get_world_size(group)
        summed = values.detach().clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.ranks, None


def join_group(rank: int, ranks: int, meeting: Path, timeout_s: float = 300.0) -> dist.ProcessGroup:
    """Join the default group over gloo. `meeting` is a file that all ranks share and that does not exist yet."""
    return _join(init_method=f"file://{meeting.absolute()}", rank=rank, world_size=ranks,
                 timeout=timedelta(seconds=timeout_s))


def join_torchrun() -> dist.ProcessGroup:
    """The same as one of the processes that `torchrun` has started: their environment says where to meet."""
    return _join()


def _join(**how: Any) -> dist.ProcessGroup:
    # DDP imports this module when it is made. Imported after the group exists, it binds the group to the defaults of
    # its functions for good: gloo's threads are never freed then, and the interpreter aborts when it exits.
    import torch.distributed.nn.functional  # noqa: F401

    dist.init_process_group("gloo", **how)
    group = dist.group.WORLD
    assert group is not None  # noqa: S101 - it was made one line above
    return group


def leave_group() -> None:
    """Leave the default group once all ranks are here: one that left earlier would break what others still send.

    Drop what refers to the group before (DDP modules, the group itself): its threads live as long as it does.
    """
    dist.barrier()
    # A DDP module refers to itself, so dropping it is not enough.
    gc.collect()
    dist.destroy_process_group()
