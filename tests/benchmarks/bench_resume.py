"""What it costs to find out what is left of a run: one listing, against looking for every shard by its name, and
against reading the fragment of every shard as some producers do with their manifests.

Files are empty here: a listing does not open them. On an object store a listing takes a request per 1,000 names.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_datasets import Shape, make_dataset

from distill_pipe.store.commit import committed_shards, restore_fragments
from distill_pipe.store.manifest import fragment_name, read_fragment, shard_name
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.status import status

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]


def fill(root: LocalRoot, shards: int) -> None:
    """Names of so many committed shards, all with the fragment of one that is real."""
    fragment = root.local(fragment_name(0)).read_bytes()
    for shard in range(1, shards):
        for name, data in ((shard_name(shard), b""), (fragment_name(shard), fragment)):
            path = root.local(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@pytest.mark.parametrize("shards", [1_000, 10_000, 100_000])
def test_resume_decision(shards: int, tmp_path: Path) -> None:
    run, root = make_dataset(tmp_path, 1, Shape(prompts_per_shard=1)), LocalRoot(tmp_path)
    fill(root, shards)
    listing = seconds(lambda: restore_fragments(root, run, committed_shards(root)))
    names = seconds(lambda: [root.size(shard_name(shard)) for shard in range(shards)])
    fragments = seconds(lambda: [read_fragment(root, shard) for shard in range(shards)])
    answer = seconds(lambda: status(root))
    print(f"\n{shards:,} committed shards: decided by listing in {listing:.2f} s; a look at each name takes "
          f"{names / listing:.1f} times that, reading each fragment {fragments / listing:.1f} times; status in "
          f"{answer:.2f} s")
    assert listing < fragments
