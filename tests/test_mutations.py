"""F34 F35: catches a shard that is damaged in any way and makes a reader crash, take memory, or believe it; and damage
that `verify` does not see."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_datasets import Shape, make_dataset


def mutate(folder: Path, mutations: int, seed: int) -> dict[str, int]:
    make_dataset(folder / "dataset", 8, Shape(hidden_codec="q8", prompts_per_shard=4))
    script = Path(__file__).with_name("mutator.py")
    line = [sys.executable, str(script), str(folder / "dataset"), str(mutations), str(seed)]
    # Each thread's own arena would count as 64 MiB of the room, however little is in it.
    done = subprocess.run(line, capture_output=True, text=True, timeout=1500,
                          env={**os.environ, "MALLOC_ARENA_MAX": "2"})
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, int] = json.loads(done.stdout)
    print(mutations, "mutations, seed", seed, found)
    assert found["read otherwise"] == 0
    assert found["missed by verify"] == 0
    return found


def test_f34_f35_a_damaged_shard_is_refused_or_read_the_same_and_always_seen_by_verify(tmp_path: Path) -> None:
    assert mutate(tmp_path, 120, 2)["refused"] > 10


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_f34_f35_two_thousand_damaged_shards(tmp_path: Path, fault_row) -> None:
    found = mutate(tmp_path, 2000, 1)
    injections = 2000 - found["unchanged"]
    fault_row("F34 F35 1,500 bit flips and 500 worse mutations of a shard", injections, injections)
