"""Failures of system calls, one at a time: strace makes the n-th call of its kind fail, or kills the process there.

Needs the Debian package `strace`, and to be allowed to trace a process that is no child.
"""

import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from faults.attempts import Attempts

# What a commit asks of a file system. Closing and stating cannot lose anything that syncing has kept.
CALLS: Final = ("openat", "mkdir", "write", "pwrite64", "fsync", "link", "linkat", "rename", "unlink", "unlinkat",
                "rmdir")


class Point(NamedTuple):
    """The `when`-th call of a system call in an attempt's main thread."""

    call: str
    when: int


def require_strace(attempts: Attempts, root: Path, scratch: Path) -> None:
    """Skips the test where strace is not there, or may not trace."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed (apt-get install strace)")
    if not points(attempts, root, scratch):
        pytest.skip("strace may not trace processes here")


def points(attempts: Attempts, root: Path, scratch: Path, what: str = "") -> list[Point]:
    """Every call that an undisturbed attempt at `root` makes below it, in order. `what` may be FINALIZE."""
    told = scratch / "calls"
    traced(attempts, f"{what}{root}", ["-y", "-o", str(told), "-e", f"trace={','.join(CALLS)}"])
    counts, found = Counter[str](), []
    for line in told.read_text().splitlines() if told.exists() else ():
        call = re.match(r"(\w+)\(", line)
        if call is None:
            continue
        counts[call[1]] += 1
        if str(root) in line:
            found.append(Point(call[1], counts[call[1]]))
    return found


def injected(attempts: Attempts, root: object, point: Point, what: str) -> int:
    """The exit code of an attempt in which `what` (`signal=SIGKILL`, `error=EIO`) happens at `point`."""
    return traced(attempts, root, ["-o", os.devnull, "-e", f"trace={point.call}", "-e",
                                   f"inject={point.call}:{what}:when={point.when}"])


def traced(attempts: Attempts, root: object, options: list[str]) -> int:
    """The exit code of an attempt under strace."""
    pid = attempts.hold(root)
    tracer = subprocess.Popen(["strace", "-p", str(pid), *options], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    attached = any("attached" in line for line in _lines_until_attached(tracer.stderr))
    os.kill(pid, signal.SIGCONT)
    code = attempts.code()
    tracer.communicate()
    assert attached or code == 0
    return code


def _lines_until_attached(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        yield line
        if "attached" in line:
            return
