"""One data-parallel rank of `test_ranks`, and the one process that its ranks are held against.

    python rank_process.py CASE FOLDER RANK RANKS

Rows are dealt out unevenly, so that means of ranks are not means of rows.

Shapes: R rows, H hidden size, V vocabulary.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from dense_losses import logits, sparse
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from distill_pipe.consume import (
    FusedLogits,
    LengthOutput,
    LossOutput,
    SparseTarget,
    expected_length_loss,
    kl_loss,
    lk_alpha_loss,
    lk_hybrid_loss,
    reverse_kl_loss,
    tv_loss,
)
from distill_pipe.consume.ranks import join_group, leave_group

R, H, V = 12, 6, 40
LOSSES = {"kl": kl_loss, "reverse_kl": reverse_kl_loss, "tv": tv_loss, "lk_alpha": lk_alpha_loss,
          "lk_hybrid": lk_hybrid_loss}


class Model(nn.Module):
    """A draft whose loss is computed inside its forward, as wrappers want it."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.body, self.lm_head = nn.Linear(H, H), nn.Linear(H, V, bias=False)
        self.fused = fused
        with torch.no_grad():
            self.body.weight.copy_(logits(H, H, 1, 0.5))
            self.body.bias.zero_()
            self.lm_head.weight.copy_(logits(V, H, 2, 0.7))

    def forward(self, name: str, rows: "Rows", group: ProcessGroup | None) -> LossOutput | LengthOutput:
        states_RH = self.body(rows.states_RH).tanh()
        draft = FusedLogits(states_RH, self.lm_head.weight, chunk_rows=2) if self.fused else self.lm_head(states_RH)
        if name == "expected_length":
            return expected_length_loss([draft, draft], [rows.target, rows.target], group=group,
                                        weights_PR=torch.stack([rows.weights_R, rows.weights_R * 2]))
        return LOSSES[name](draft, rows.target, weights_R=rows.weights_R, group=group)


class Rows:
    """Some of the R rows."""

    def __init__(self, picked: slice) -> None:
        self.states_RH, self.target = logits(R, H, 3)[picked], sparse(logits(R, V, 4))[picked]
        self.weights_R = torch.arange(R).float()[picked]
        assert isinstance(self.target, SparseTarget)


def found(model: nn.Module, names: list[str], rows: Rows, group: ProcessGroup | None) -> dict[str, Tensor]:
    """The scalars of each loss and the gradients it leaves."""
    results: dict[str, Tensor] = {}
    for name in names:
        model.zero_grad()
        output = model(name, rows, group)
        output.loss.backward()
        scalars = ("loss", "length", "length_lower", "alpha_P") if isinstance(output, LengthOutput) else (
            "loss", "alpha", "alpha_lower", "alpha_upper")
        results |= {f"{name}.{s}": getattr(output, s).detach() for s in scalars}
        for parameter, value in model.named_parameters():
            grad = value.grad.full_tensor() if hasattr(value.grad, "full_tensor") else value.grad
            results[f"grad.{name}.{parameter.removeprefix('module.')}"] = grad.clone()
    return results


def names_of(case: str) -> list[str]:
    return ["lk_hybrid"] if case in ("fused", "sharded", "empty", "threads") else [*LOSSES, "expected_length"]


def found_alone(case: str) -> dict[str, Tensor]:
    """What one process finds on all rows."""
    return found(Model(fused=False), names_of(case), Rows(slice(0, R)), None)


def share(case: str, rank: int, ranks: int) -> slice:
    """A rank's rows: the last rank has most of them, or in the case `empty` all."""
    if case == "empty":
        return slice(0, 0) if rank == 0 else slice(0, R)
    return slice(rank, R if rank == ranks - 1 else rank + 1)


def num_threads() -> int:
    """Threads of gloo in this process."""
    names = [Path("/proc/self/task", task, "comm").read_text() for task in os.listdir("/proc/self/task")]
    return sum("gloo" in name for name in names)


def main(case: str, folder: Path, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    before = num_threads()
    group = join_group(rank, ranks, folder / "meeting", timeout_s=120)
    if case == "sharded":
        from torch.distributed.fsdp import fully_shard

        model: nn.Module = fully_shard(Model(fused=True))
    else:
        model = DistributedDataParallel(Model(fused=case == "fused"))
    results = found(model, names_of(case), Rows(share(case, rank, ranks)), group)
    joined = num_threads()
    del model, group
    leave_group()
    if case == "threads":
        results = {"threads": torch.tensor([before, joined, num_threads()])}
    np.savez(folder / f"rank-{rank}.npz", **{name: value.numpy() for name, value in results.items()})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
