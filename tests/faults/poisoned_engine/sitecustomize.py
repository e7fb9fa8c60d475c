"""Makes prompts poisonous for the real engine. Python imports this by itself at start-up when the folder is on
PYTHONPATH, and `tests` must be there as well.

    POISONOUS_ORDINALS    prompts, by number, that end the engine's process as soon as it has them and runs
"""

import os
import sys
from typing import Any

from ray_executor.sitecustomize import After

POISONOUS = {int(ordinal) for ordinal in os.environ.get("POISONOUS_ORDINALS", "").split(",") if ordinal}


def poison(module: Any) -> None:
    engine = module.VllmEngine
    add, step = engine.add, engine.step

    def add_and_swallow(self: Any, request: Any) -> None:
        add(self, request)
        self.poisoned = getattr(self, "poisoned", False) or request.ordinal in POISONOUS

    def step_or_die(self: Any) -> Any:
        if getattr(self, "poisoned", False):
            os._exit(1)
        return step(self)

    engine.add, engine.step = add_and_swallow, step_or_die


if POISONOUS:
    sys.meta_path.insert(0, After("distill_pipe.produce.vllm_engine", poison))
