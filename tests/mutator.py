"""`python mutator.py ROOT MUTATIONS SEED`: damages a shard of a dataset in as many ways and reads it as a trainer and
`verify` do, in a process that may use 1 GiB more than it has. Prints what came of it as JSON. See `test_mutations.py`.
"""

import json
import random
import resource
import sys
from pathlib import Path

import torch

from distill_pipe.consume.reader import Batch, ShardReader
from distill_pipe.errors import DistillPipeError
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.verify import verify

ROOM = 1 << 30


def mutated(data: bytes, luck: random.Random, kind: str) -> bytes:
    """One bit flipped, or something worse."""
    at = luck.randrange(len(data))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << luck.randrange(8))]) + data[at + 1:]
    length = luck.randint(1, 64)
    if kind == "cut":
        return data[:at]
    if kind == "zero":
        return (data[:at] + bytes(length) + data[at + length:])[:len(data)]
    if kind == "noise":
        return (data[:at] + luck.randbytes(length) + data[at + length:])[:len(data)]
    if kind == "insert":
        return data[:at] + luck.randbytes(length) + data[at:]
    source = luck.randrange(len(data))
    return (data[:at] + data[source:source + length] + data[at + length:])[:len(data)]


def batches(root: LocalRoot) -> list[Batch]:
    return list(ShardReader(root.path, layers=(1, 4)))


def same(a: Batch, b: Batch) -> bool:
    pairs = [(a.token_ids_T, b.token_ids_T), (a.rows_R, b.rows_R), *((a.hidden[n], b.hidden[n]) for n in a.hidden),
             *((getattr(a.target, name), getattr(b.target, name)) for name in (
                 "topk_ids_RK", "topk_logprobs_RK", "tail_mass_R", "tail_ids_RM", "tail_logprobs_RM"))]
    return all(torch.equal(x, y) for x, y in pairs)


def main(folder: str, mutations: str, seed: str) -> None:
    root, luck = LocalRoot(folder), random.Random(int(seed))
    whole = batches(root)
    files = sorted(p for part in ("data", "hidden_states") for p in Path(folder, part).rglob("*.parquet"))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    found = {"unchanged": 0, "refused": 0, "read the same": 0, "read otherwise": 0, "missed by verify": 0}
    for number in range(int(mutations)):
        path = luck.choice(files)
        data = path.read_bytes()
        bad = mutated(data, luck, "flip" if number % 4 else luck.choice(["cut", "zero", "noise", "insert", "copy"]))
        if bad == data:
            found["unchanged"] += 1
            continue
        path.write_bytes(bad)
        found["missed by verify"] += verify(root).clean
        try:
            read = batches(root)
            alike = len(read) == len(whole) and all(same(a, b) for a, b in zip(read, whole, strict=True))
            found["read the same" if alike else "read otherwise"] += 1
        except DistillPipeError:
            found["refused"] += 1
        path.write_bytes(data)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
