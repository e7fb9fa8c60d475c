"""`python nodes.py FOLDER COUNT`: a Ray cluster of this process, a head without room for engines and COUNT nodes with
room for one each. Prints its address and obeys lines on stdin; ends, with all it started, when its input ends.

    lose N     SIGKILL every process of node N
    freeze N   SIGSTOP them, as a network that is cut looks from outside; `wake N` lets them go on
    drain N    announce that node N goes in 3 s, as a cloud does
    add        one more node
    behead     SIGKILL the cluster's head
"""

import os
import signal
import sys
import time
from pathlib import Path

import psutil

DRAIN_SECONDS = 3
PREEMPTION = 2
# A frozen node counts as dead after two seconds instead of half a minute.
_HEALTH = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_timeout_ms": 1000,
           "health_check_failure_threshold": 3}


def main(folder: str, count: str) -> None:
    from ray.cluster_utils import Cluster

    shared = {"include_dashboard": False, "temp_dir": folder, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": _HEALTH, **shared})
    nodes = [cluster.add_node(num_cpus=1, **shared) for _ in range(int(count))]
    print(cluster.address, flush=True)
    for line in sys.stdin:
        command, *rest = line.split()
        node = nodes[int(rest[0])] if rest else None
        if command == "add":
            nodes.append(cluster.add_node(num_cpus=1, **shared))
        elif command == "lose":
            kill(cluster, node)
        elif command == "freeze":
            signal_all(node, signal.SIGSTOP)
        elif command == "wake":
            signal_all(node, signal.SIGCONT)
        elif command == "drain":
            drain(cluster, node)
        elif command == "behead":
            signal_all(cluster.head_node, signal.SIGKILL)
        print("ok", flush=True)


def processes(node) -> list[psutil.Process]:  # type: ignore[no-untyped-def]
    """What a node runs: what Ray started for it, and the workers that its raylet started."""
    own = [psutil.Process(info.process.pid) for group in node.all_processes.values() for info in group]
    return own + [child for process in own if process.is_running() for child in process.children(recursive=True)]


def signal_all(node, number: int) -> None:  # type: ignore[no-untyped-def]
    # Raylet first: stopped, it cannot tell of its workers' end.
    for process in processes(node):
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            continue


def kill(cluster, node) -> None:  # type: ignore[no-untyped-def]
    signal_all(node, signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)


def drain(cluster, node) -> None:  # type: ignore[no-untyped-def]
    from ray._raylet import GcsClient

    deadline = int((time.time() + DRAIN_SECONDS) * 1000)
    accepted, reason = GcsClient(address=cluster.address).drain_node(node.node_id, PREEMPTION, "a test", deadline)
    assert accepted, reason


if __name__ == "__main__":
    assert Path(sys.argv[1]).is_dir()
    main(*sys.argv[1:])
