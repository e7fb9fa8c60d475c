"""`python nodes.py FOLDER GPUS...`: a Ray cluster of this process, with one node per number of GPUs. Prints its address
and ends, with all that it started, when its input ends: also when the test that holds the other end is killed."""

import sys


def main(folder: str, *gpus: str) -> None:
    from ray.cluster_utils import Cluster

    # Not `cluster.shutdown`, which forgets the address of every cluster on the machine. Nodes end at exit.
    cluster = Cluster()
    for number in gpus:
        cluster.add_node(num_cpus=2, num_gpus=int(number), include_dashboard=False, temp_dir=folder,
                         object_store_memory=80 << 20)
    print(cluster.address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
