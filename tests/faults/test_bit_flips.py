"""F34 to F36: single bits flipped anywhere in a finished dataset, files cut short, files swapped.

Catches damage that is neither reported by a deep verification nor refused by a reader, and yet changes a number that
somebody reads. `make test` flips 150 bits, `make faults` 1,500.
"""

import hashlib
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from runs import stored_traces
from tiny_datasets import Shape, make_dataset, random_trace, start_run

from distill_pipe.errors import DistillPipeError
from distill_pipe.store.commit import commit_shard, committed_shards, shard_fragment
from distill_pipe.store.finalize import MANIFEST, STATISTICS, TOKENS, finalize
from distill_pipe.store.hidden_codec import encode_trace, require_finite
from distill_pipe.store.manifest import require_run
from distill_pipe.store.norm import read_final_norm, write_final_norm
from distill_pipe.store.parquet import Limit, read_table
from distill_pipe.store.plan import num_shards, read_planned_shard, shard_range
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import QuarantinedPrompt, read_quarantine
from distill_pipe.store.statistics import TOKEN_SCHEMA
from distill_pipe.store.verify import verify

SHAPE = Shape(prompts_per_shard=3, layers=(1, 4))
PROMPTS = 6


@pytest.fixture
def root(tmp_path: Path) -> LocalRoot:
    """A finished dataset with a file of every kind."""
    run, store = start_run(tmp_path / "root", PROMPTS, SHAPE), LocalRoot(tmp_path / "root")
    write_final_norm(store, np.linspace(0.5, 2, SHAPE.hidden_size, dtype=np.float32))
    for shard in range(num_shards(run)):
        *kept, lost = range(*shard_range(run, shard))
        commit_shard(store, run, shard, [encode_trace(random_trace(o, SHAPE), SHAPE.hidden_codec) for o in kept],
                     [QuarantinedPrompt(lost, f"prompt-{lost}", "engine", "why")])
    finalize(store)
    return store


def all_that_is_read(root: LocalRoot) -> str:
    """A hash of every value that this package hands out of a dataset."""
    told, run = hashlib.sha256(), require_run(root)
    told.update(repr(run.spec).encode())
    for trace in stored_traces(root.path):
        values = [getattr(trace, name) for name in trace.__dataclass_fields__]
        for value in values:
            told.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    for shard in sorted(committed_shards(root)):
        info = shard_fragment(root, run, shard).info
        told.update(repr(read_planned_shard(root, run, shard)).encode())
        told.update(repr(info.measured).encode())
        assert info.quarantine is not None
        told.update(repr(read_quarantine(root.local(info.quarantine.name), info.quarantined)).encode())
    told.update(read_final_norm(root, run.spec.target.hidden_size).tobytes())
    tokens = read_table(root.local(TOKENS), TOKEN_SCHEMA, dict.fromkeys(TOKEN_SCHEMA.names, Limit(SHAPE.vocab_size)))
    told.update(repr(tokens.to_pydict()).encode())
    return told.hexdigest()


def noticed(root: LocalRoot) -> bool:
    """Whether a deep verification or a reader reports anything."""
    try:
        if not verify(root, deep=True, check_states=require_finite).clean:
            return True
        all_that_is_read(root)
    except DistillPipeError:
        return True
    return False


def flip_bits(root: LocalRoot, flips: int, seed: int) -> Counter[str]:
    """What became of so many flips of one bit, each in a random place of a random file."""
    chance, outcomes = random.Random(seed), Counter[str]()
    before = all_that_is_read(root)
    files = sorted(p for p in root.path.rglob("*") if p.is_file())
    for i in range(flips):
        # Every file gets its share, however small it is.
        path = files[i % len(files)]
        data = bytearray(path.read_bytes())
        at = chance.randrange(len(data))
        bit = 1 << chance.randrange(8)
        data[at] ^= bit
        path.write_bytes(data)
        if noticed(root):
            outcomes["noticed"] += 1
        else:
            assert all_that_is_read(root) == before, f"bit {bit} of byte {at} of {path.name} is silently wrong"
            outcomes["harmless"] += 1
        data[at] ^= bit
        path.write_bytes(data)
    assert verify(root, deep=True).clean
    return outcomes


def test_f34_a_flipped_bit_is_noticed_or_changes_nothing(root, fault_row) -> None:
    outcomes = flip_bits(root, 150, seed=0)
    assert outcomes["noticed"] > outcomes["harmless"]
    fault_row("F34 one bit flipped (fast)", 150, outcomes.total())


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_f34_1500_flipped_bits_are_noticed_or_change_nothing(root, fault_row) -> None:
    outcomes = flip_bits(root, 1500, seed=1)
    fault_row(f"F34 one bit flipped: {outcomes['noticed']} noticed, {outcomes['harmless']} harmless", 1500,
              outcomes.total())


@pytest.mark.matrix
@pytest.mark.parametrize("damage", ["empty", "half", "last byte", "zeros"])
def test_f35_a_shard_or_sidecar_that_is_cut_short_is_noticed(damage, root, fault_row) -> None:
    folders = ("data", "hidden_states", "_quarantine", "plan")
    files = [path for folder in folders for path in (root.path / folder).rglob("*.parquet")]
    for path in files:
        data = path.read_bytes()
        cut = {"empty": b"", "half": data[:len(data) // 2], "last byte": data[:-1],
               "zeros": data[:100] + bytes(64) + data[164:]}[damage]
        path.write_bytes(cut)
        assert noticed(root), path
        path.write_bytes(data)
    assert not noticed(root)
    fault_row(f"F35 file with damage: {damage}", len(files), len(files))


@pytest.mark.matrix
def test_f36_summary_files_of_another_dataset_are_noticed(root, tmp_path, fault_row) -> None:
    make_other(tmp_path / "other")
    for name in (MANIFEST, STATISTICS, TOKENS):
        data = root.local(name).read_bytes()
        root.local(name).write_bytes((tmp_path / "other" / name).read_bytes())
        assert noticed(root), name
        root.local(name).write_bytes(data)
    fault_row("F36 summary file of another dataset", 3, 3)


def make_other(path: Path) -> None:
    make_dataset(path, PROMPTS, SHAPE, seed=5)
    finalize(LocalRoot(path))
