"""A Ray cluster of one node with a job server, in a process of its own: prints the addresses of the server and of its
metrics, and ends with its stdin. Tests start it, so that what runs on the cluster inherits nothing from them."""

import os
import sys


def main() -> None:
    import ray

    # `python` is this one for every job.
    os.environ["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    context = ray.init(address="local", num_cpus=2, include_dashboard=True, dashboard_host="127.0.0.1",
                       log_to_driver=False, logging_level="ERROR", object_store_memory=100 << 20)
    [node] = ray.nodes()
    sys.stdout.write(f"http://{context.dashboard_url} http://127.0.0.1:{node['MetricsExportPort']}/metrics\n")
    sys.stdout.flush()
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main()
