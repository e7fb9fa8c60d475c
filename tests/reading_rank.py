"""One data-parallel rank that trains on a dataset, and the one process that its ranks are held against.

    python reading_rank.py DATASET FOLDER RANK RANKS

Shapes: R rows, H hidden size, V vocabulary.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from distill_pipe.consume import Batch, LossOutput, ShardReader, join, lk_hybrid_loss
from distill_pipe.consume.ranks import join_group, leave_group

H, V, LAYER, EPOCHS = 8, 64, 1, 2


class Draft(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(H, V)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-1, 1, V * H).view(V, H))
            self.head.bias.zero_()

    def forward(self, batch: Batch, group: ProcessGroup | None) -> LossOutput:
        return lk_hybrid_loss(self.head(batch.hidden[LAYER][batch.rows_R].float()), batch.target, group=group)


def reader(root: Path, rank: int, ranks: int) -> ShardReader:
    return ShardReader(root, layers=(LAYER,), batch_tokens=50, dp_rank=rank, dp_world=ranks)


def train_alone(root: Path, ranks: int) -> dict[str, Tensor]:
    """What the ranks read, joined step by step into the batches of one process."""
    draft = Draft()
    optimizer = torch.optim.SGD(draft.parameters(), lr=0.5)
    readers, losses = [reader(root, rank, ranks) for rank in range(ranks)], []
    for epoch in range(EPOCHS):
        for batches in zip(*(r.at_epoch(epoch) for r in readers), strict=True):
            losses.append(step(draft, optimizer, join(list(batches)), None))
    return {"losses": torch.stack(losses), "weight": draft.head.weight.detach()}


def step(draft: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, group: ProcessGroup | None) -> Tensor:
    optimizer.zero_grad()
    output = draft(batch, group)
    output.loss.backward()
    optimizer.step()
    loss: Tensor = output.loss.detach()
    return loss


def main() -> None:
    root, folder, rank, ranks = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    group: ProcessGroup | None = join_group(rank, ranks, folder / "meeting")
    draft: DistributedDataParallel | None = DistributedDataParallel(Draft())
    assert draft is not None
    optimizer = torch.optim.SGD(draft.parameters(), lr=0.5)
    own, losses, seen = reader(root, rank, ranks), [], []
    for epoch in range(EPOCHS):
        own.set_epoch(epoch)
        for batch in own:
            losses.append(step(draft, optimizer, batch, group))
            seen += [] if batch.is_padding else batch.ordinals_B.tolist()
    np.savez(folder / f"rank-{rank}.npz", losses=torch.stack(losses).numpy(), seen=np.array(seen),
             weight=draft.module.head.weight.detach().numpy())
    del optimizer
    draft = group = None
    leave_group()


if __name__ == "__main__":
    main()
