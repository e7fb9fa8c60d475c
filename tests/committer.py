"""A process for tests to kill, race or starve: commits what a donor dataset holds into another root.

    python committer.py DONOR ROOT [BYTES]
    python committer.py DONOR ROOT --fork

Prints a line with its process id after each commit. BYTES limits the size of any file it writes. With --fork, each line
on stdin starts an attempt in a fork, and `gone` is printed when it is dead: an attempt then costs no start of Python.
Imports the store alone.
"""

import os
import resource
import sys

from distill_pipe.errors import DistillPipeError
from distill_pipe.store.commit import adopt_shard, commit_shard, committed_shards, encode_trace
from distill_pipe.store.manifest import Run, require_run, shard_name
from distill_pipe.store.plan import num_shards
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import read_sidecar_info, read_table, traces_from_tables


def copy_shard(donor: LocalRoot, root: LocalRoot, run: Run, shard: int) -> None:
    hidden = adopt_shard(donor, run, shard).info.hidden
    assert hidden is not None
    path = donor.local(hidden.name)
    traces = traces_from_tables(read_table(donor.local(shard_name(shard))), read_table(path), read_sidecar_info(path))
    commit_shard(root, run, shard, [encode_trace(t, run) for t in traces], [])


def main() -> None:
    donor, root = LocalRoot(sys.argv[1]), LocalRoot(sys.argv[2])
    run = require_run(root)
    done = committed_shards(root)
    if sys.argv[3:] not in ([], ["--fork"]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
    for shard in range(num_shards(run)):
        if shard in done:
            adopt_shard(root, run, shard)
        else:
            copy_shard(donor, root, run, shard)
            print(os.getpid(), flush=True)


def fork_attempts() -> None:
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            main()
            os._exit(0)
        os.waitpid(child, 0)
        print("gone", flush=True)


if __name__ == "__main__":
    try:
        fork_attempts() if sys.argv[3:] == ["--fork"] else main()
    except DistillPipeError as error:
        sys.exit(f"{type(error).__name__}: {error}")
