"""What it costs to find out what is left of a run: one listing, against looking for every shard by its name, and
against reading the fragment of every shard as some producers do with their manifests. And what a run holds of it in
memory to its end: a byte per shard, against a set of numbers.

Files are empty here: a listing does not open them. On an object store a listing takes a request per 1,000 names.
"""

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_datasets import Shape, random_trace, start_run

from distill_pipe.store.commit import commit_shard, committed_flags, committed_shards, restore_fragments
from distill_pipe.store.hidden_codec import encode_trace
from distill_pipe.store.manifest import Run, fragment_name, read_fragment, shard_name
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.status import status

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]
ONE = Shape(prompts_per_shard=1)


def fill(root: LocalRoot, run: Run, shards: int) -> None:
    """Names of so many committed shards, all with the fragment of one that is real."""
    commit_shard(root, run, 0, [encode_trace(random_trace(0, ONE), run.spec.capture.hidden_codec)], [])
    fragment = root.local(fragment_name(0)).read_bytes()
    for shard in range(1, shards):
        for name, data in ((shard_name(shard), b""), (fragment_name(shard), fragment)):
            path = root.local(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def decide(root: LocalRoot, run: Run) -> bytearray:
    """As `generate` does it."""
    committed = committed_flags(root, run)
    restore_fragments(root, run, (shard for shard, done in enumerate(committed) if done))
    return committed


def held_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes of what a call returns, and the most that it held meanwhile."""
    tracemalloc.start()
    kept = call()
    found = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return found


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@pytest.mark.parametrize("shards", [1_000, 10_000, 100_000])
def test_resume_decision(shards: int, tmp_path: Path) -> None:
    run, root = start_run(tmp_path, shards, ONE), LocalRoot(tmp_path)
    fill(root, run, shards)
    listing = seconds(lambda: decide(root, run))
    (kept, most), (as_set, _) = held_bytes(lambda: decide(root, run)), held_bytes(lambda: committed_shards(root))
    names = seconds(lambda: [root.size(shard_name(shard)) for shard in range(shards)])
    fragments = seconds(lambda: [read_fragment(root, shard) for shard in range(shards)])
    answer = seconds(lambda: status(root))
    print(f"\n{shards:,} committed shards: decided by listing in {listing:.2f} s; a look at each name takes "
          f"{names / listing:.1f} times that, reading each fragment {fragments / listing:.1f} times; status in "
          f"{answer:.2f} s; {kept / shards:.1f} bytes per shard are kept and {most / shards:.1f} held meanwhile, a set "
          f"takes {as_set / shards:.1f}")
    assert listing < fragments
