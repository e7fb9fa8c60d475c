"""Catches data-parallel ranks whose loss or gradients are not those of their rows as one batch, and ranks that hang.

Each rank is a process of its own (`rank_process`), over gloo, with its share of the rows. Shapes: R rows, V vocabulary.
"""

from pathlib import Path

import pytest
import rank_process
import torch
from rank_group import run_ranks


def found_by_ranks(folder: Path, case: str, ranks: int) -> list[dict[str, torch.Tensor]]:
    """What each rank found."""
    return [{name: torch.from_numpy(array) for name, array in arrays.items()}
            for arrays in run_ranks(rank_process.__file__, folder, ranks, case)]


@pytest.mark.parametrize(("case", "ranks"), [("losses", 2), ("losses", 4), ("fused", 2), ("sharded", 2)])
def test_ranks_have_the_loss_and_gradients_of_one_process_on_all_rows(tmp_path: Path, case: str, ranks: int) -> None:
    alone = rank_process.found_alone(case)
    assert {name for name in alone if name.startswith("grad")}
    for found in found_by_ranks(tmp_path, case, ranks):
        assert set(found) == set(alone)
        for name, expected in alone.items():
            assert torch.allclose(found[name], expected, rtol=1e-4, atol=1e-6), name


def test_a_rank_without_any_row_takes_part(tmp_path: Path) -> None:
    alone = rank_process.found_alone("empty")
    for found in found_by_ranks(tmp_path, "empty", 2):
        for name, expected in alone.items():
            assert torch.allclose(found[name], expected, rtol=1e-4, atol=1e-6), name


def test_leaving_a_group_frees_its_threads(tmp_path: Path) -> None:
    for found in found_by_ranks(tmp_path, "threads", 2):
        before, joined, after = found["threads"].tolist()
        assert (before, after) == (0, 0)
        assert joined > 0
