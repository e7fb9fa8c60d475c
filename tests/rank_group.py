"""Processes that make a group, one for each rank: started together, and none outlives its test."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def run_ranks(script: str | None, folder: Path, ranks: int, *arguments: object) -> list[dict[str, NDArray[np.generic]]]:
    """What each rank wrote to `folder`/rank-N.npz, of `script ARGUMENTS FOLDER RANK RANKS`. Every process must end by
    itself and with 0: an abort on the way out is a failure."""
    command = [sys.executable, str(script), *map(str, arguments), str(folder)]
    processes = [subprocess.Popen([*command, str(rank), str(ranks)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  text=True) for rank in range(ranks)]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [dict(np.load(folder / f"rank-{rank}.npz")) for rank in range(ranks)]
