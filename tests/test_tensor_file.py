"""Catches a full disk that ends in a traceback of another library."""

import errno
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill_pipe.consume.tensor_file import save_tensors

TENSORS = {"a": torch.arange(100_000)}


def test_tensors_are_written_as_they_are(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", TENSORS, {"format": "pt"})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], TENSORS["a"])


def test_a_full_disk_is_said_to_be_full(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large") as full:
            save_tensors(tmp_path / "x.safetensors", TENSORS)
        assert full.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_missing_folder_is_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        save_tensors(tmp_path / "nowhere" / "x.safetensors", TENSORS)
