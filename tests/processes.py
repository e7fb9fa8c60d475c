"""Which test files share a process when tests run in several (pytest-xdist).

Files that start vLLM or Ray, or read a dataset that the engine makes once per process, go to one process: two engines
at once would fight over two cores, and each process would make those datasets again. Every other file is a unit of its
own.
"""

import re
from functools import cache
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

ENGINES = "engines"
_STARTS_ENGINE = re.compile(r"mark\.(engine|ray)\b|\b(generated|scored): Path")


class EnginesInOneProcess(LoadScopeScheduling):
    """Whole files to whichever process is free; the engines' files first, since they take longest."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return ENGINES if _starts_engine(file) else file

    def _assign_work_unit(self, node: object) -> None:
        if ENGINES in self.workqueue:
            self.workqueue.move_to_end(ENGINES, last=False)
        super()._assign_work_unit(node)


@cache
def _starts_engine(file: str) -> bool:
    return _STARTS_ENGINE.search(Path(file).read_text()) is not None
