"""Catches a commit that takes memory by the size of its shard: two shards in flight leave no room for a third.

The shards are real ones, committed in a process of their own; see `heavy_commit.py`.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from distill_pipe.store.manifest import require_run
from distill_pipe.store.parquet_writer import ROW_GROUP_BYTES
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.verify import verify

# The row group that is being written, and its largest column as a page: in a buffer that grows, and compressed.
ALLOWED_BYTES = 5 * ROW_GROUP_BYTES // 2


@pytest.mark.parametrize(("codec", "mebibytes"), [("f32", 192), ("q6", 128)])
def test_a_commit_needs_little_more_than_a_row_group_beyond_its_shard(tmp_path: Path, codec: str,
                                                                      mebibytes: int) -> None:
    assert committed(tmp_path, codec, mebibytes, traces=32) < ALLOWED_BYTES
    root = LocalRoot(tmp_path)
    assert require_run(root).spec.capture.hidden_codec == codec
    assert verify(root).clean


def test_a_trace_larger_than_a_row_group_is_not_copied_as_a_whole(tmp_path: Path) -> None:
    # Two traces of four blobs. Of one blob, Arrow's writer takes seven times its bytes; four more would be a copy.
    blob = 24 << 20
    assert committed(tmp_path, "f32", mebibytes=8 * blob >> 20, traces=2) < 8 * blob


def committed(out: Path, codec: str, mebibytes: int, traces: int) -> int:
    """Bytes of memory beyond the shard that its commit took at most."""
    line = [sys.executable, Path(__file__).with_name("heavy_commit.py"), out, codec, str(mebibytes), str(traces)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    held, beyond = map(int, done.stdout.split())
    assert held == mebibytes << 20
    return beyond
