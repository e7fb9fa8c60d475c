"""Catches a final norm that comes back as other numbers, or one of another model that is read anyway."""

from pathlib import Path

import numpy as np
import pytest

from distill_pipe.errors import DamageError
from distill_pipe.store.manifest import FINAL_NORM
from distill_pipe.store.norm import read_final_norm, write_final_norm
from distill_pipe.store.root import LocalRoot


def test_the_weight_comes_back_to_the_bit_and_is_written_once(tmp_path: Path) -> None:
    root, weight_H = LocalRoot(tmp_path), np.random.default_rng(0).normal(1, 0.1, 576).astype(np.float32)
    write_final_norm(root, weight_H)
    write_final_norm(root, weight_H * 2)
    assert np.array_equal(read_final_norm(root, 576), weight_H)


@pytest.mark.parametrize("hidden_size", [575, 577])
def test_a_weight_of_another_size_is_refused(tmp_path: Path, hidden_size: int) -> None:
    write_final_norm(LocalRoot(tmp_path), np.ones(576, np.float32))
    with pytest.raises(DamageError, match="final_norm"):
        read_final_norm(LocalRoot(tmp_path), hidden_size)


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamageError, match=FINAL_NORM):
        read_final_norm(LocalRoot(tmp_path), 576)
