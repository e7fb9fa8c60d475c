"""Lets vLLM's V2 model runner, the one that GPUs use, run on a machine that has none. Python imports this by itself at
start-up when the folder is on PYTHONPATH, so it is in every process of a run.

The kernels run in Triton's interpreter (TRITON_INTERPRET=1), which is exact and slow. vLLM wants to see a Triton that
has a CPU backend, so it is shown one; nothing of the runner itself is changed. What the runner did is written down step
by step, so that a test can tell that this runner ran, and how it was driven.

    V2_RUNNER_TRACE       a file that gets one JSON line per step
    V2_RUNNER_SCHEDULER   a JSON object of scheduler settings that vLLM's CPU platform would turn off
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


class NoDriver:
    """vLLM looks a CPU backend up by its name, and torch asks every backend whether it is active. Triton's interpreter
    asks for nothing of it."""

    @staticmethod
    def is_active() -> bool:
        return False


def add_cpu_backend(backends: Any) -> None:
    backends.backends["cpu"] = backends.Backend(compiler=None, driver=NoDriver)


def keep_scheduler_settings(cpu: Any) -> None:
    check = cpu.CpuPlatform.check_and_update_config

    def check_and_keep(vllm_config: Any) -> None:
        check(vllm_config)
        for name, value in json.loads(os.environ["V2_RUNNER_SCHEDULER"]).items():
            assert hasattr(vllm_config.scheduler_config, name)
            setattr(vllm_config.scheduler_config, name, value)

    cpu.CpuPlatform.check_and_update_config = staticmethod(check_and_keep)


def write_down_steps(runner: Any) -> None:
    sample = runner.GPUModelRunner.sample_tokens

    def sample_and_write_down(self: Any, grammar_output: Any) -> Any:
        state = self.execute_model_state
        output = sample(self, grammar_output)
        if state is not None:
            batch = state.input_batch
            seen = batch.num_computed_tokens_np + batch.num_scheduled_tokens
            step = {"runner": f"{type(self).__module__}.{type(self).__name__}", "output": type(output).__name__,
                    "async_scheduling": self.scheduler_config.async_scheduling,
                    "tokens": batch.num_scheduled_tokens.tolist(), "starts": batch.num_computed_tokens_np.tolist(),
                    "requests": list(batch.req_ids), "unfinished_prompts": int((seen < batch.prefill_len_np).sum())}
            with open(os.environ["V2_RUNNER_TRACE"], "a", encoding="utf-8") as trace:
                trace.write(json.dumps(step) + "\n")
        return output

    runner.GPUModelRunner.sample_tokens = sample_and_write_down


if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    sys.meta_path.insert(0, After("triton.backends", add_cpu_backend))
    if "V2_RUNNER_SCHEDULER" in os.environ:
        sys.meta_path.insert(0, After("vllm.platforms.cpu", keep_scheduler_settings))
    if "V2_RUNNER_TRACE" in os.environ:
        sys.meta_path.insert(0, After("vllm.v1.worker.gpu.model_runner", write_down_steps))
