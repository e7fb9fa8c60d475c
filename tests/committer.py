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
from distill_pipe.store.commit import adopt_shard, commit_shard, committed_shards
from distill_pipe.store.manifest import Run, require_run, shard_name
from distill_pipe.store.plan import num_shards
from distill_pipe.store.root import LocalRoot, Root, open_root
from distill_pipe.store.shard import read_main, traces_from_table
from distill_pipe.store.sidecar import EncodedTrace, blobs_of, read_sidecar, read_sidecar_info


def copy_shard(donor: LocalRoot, root: Root, run: Run, shard: int) -> None:
    info = adopt_shard(donor, run, shard).info
    assert info.hidden is not None
    path = donor.local(info.hidden.name)
    sidecar = read_sidecar_info(path)
    hidden = read_sidecar(path, sidecar, sidecar.layers, info.traces, info.tokens)
    traces = traces_from_table(read_main(donor.local(shard_name(shard)), info, run.spec.capture))
    commit_shard(root, run, shard, [EncodedTrace(t, blobs_of(hidden, sidecar, i)) for i, t in enumerate(traces)], [])


def copy_dataset(donor: LocalRoot, root: Root) -> None:
    """Commit what is not committed yet, as a run that is started again does."""
    run = require_run(root)
    done = committed_shards(root)
    for shard in range(num_shards(run)):
        if shard in done:
            adopt_shard(root, run, shard)
        else:
            copy_shard(donor, root, run, shard)
            print(os.getpid(), flush=True)


def main() -> None:
    if sys.argv[3:] not in ([], ["--fork"]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
    copy_dataset(LocalRoot(sys.argv[1]), open_root(sys.argv[2]))


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
