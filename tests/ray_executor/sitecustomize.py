"""Lets Ray place vLLM's workers on a machine without GPUs. Python imports this by itself at start-up when the folder is
on PYTHONPATH, so it is in every process of a Ray node that was started with it.

vLLM asks its platform which of Ray's resources a worker takes, and its CPU platform has no answer. Here it is the GPUs
that the node claims to have. Nothing else is changed. Where each worker was placed is written down, so that a test can
tell which executor ran, and over which nodes.

    RAY_EXECUTOR_TRACE    a file that gets one JSON line per worker
"""

import json
import os
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class After(MetaPathFinder):
    """Runs `change` on a module when it has been imported."""

    def __init__(self, module: str, change: Callable[[Any], None]) -> None:
        self._module, self._change = module, change

    def find_spec(self, fullname: str, path: Any, _target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            self._change(module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def count_as_gpus(cpu: Any) -> None:
    cpu.CpuPlatform.ray_device_key = "GPU"


def write_down_places(executor: Any) -> None:
    find = executor.RayWorkerProc.get_node_and_physical_gpu_ids

    def find_and_write_down(self: Any) -> tuple[str, list[int]]:
        node, devices = find(self)
        worker = {"engine": self._init_kwargs["vllm_config"].instance_id, "rank": self._init_kwargs["rank"],
                  "node": node, "devices": devices, "process": os.getpid()}
        with open(os.environ["RAY_EXECUTOR_TRACE"], "a", encoding="utf-8") as trace:
            trace.write(json.dumps(worker) + "\n")
        return node, devices

    executor.RayWorkerProc.get_node_and_physical_gpu_ids = find_and_write_down


if "RAY_EXECUTOR_TRACE" in os.environ:
    sys.meta_path.insert(0, After("vllm.platforms.cpu", count_as_gpus))
    sys.meta_path.insert(0, After("vllm.v1.executor.ray_executor_v2", write_down_places))
