"""Attempts at committing a dataset, each in a process of its own that a test holds before its first step.

Run as a script it is the other side: a process that forks an attempt for each line on stdin, which names the root.
A fork costs no start of Python, so that hundreds of them can be killed in a minute.
"""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

UNEXPECTED = 99
# In front of a root: the attempt is at summing it up.
FINALIZE = "finalize:"
_PR_SET_PDEATHSIG, _PR_SET_PTRACER = 1, 0x59616D61


class Attempts:
    """Starts attempts that copy the shards of a donor dataset; see `committer`. Objects of more than `part_bytes` are
    uploaded in parts."""

    def __init__(self, donor: Path, part_bytes: int = 16 << 20) -> None:
        self._line = [sys.executable, "-m", "faults.attempts", str(donor), str(part_bytes)]

    def __enter__(self) -> Self:
        path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
        self._server = subprocess.Popen(self._line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, "PYTHONPATH": path})
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._server.kill()
        self._server.communicate()

    def hold(self, root: object) -> int:
        """The process of a new attempt, which stands still; SIGCONT lets it go."""
        assert self._server.stdin is not None
        self._server.stdin.write(f"{root}\n")
        self._server.stdin.flush()
        return self._told()

    def code(self) -> int:
        """How the attempt ended: its exit code, or the signal that ended it as a negative number."""
        return self._told()

    def run(self, root: object) -> int:
        """An attempt that nothing happens to."""
        os.kill(self.hold(root), signal.SIGCONT)
        return self.code()

    def _told(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())


def _attempt(donor: str, root: str) -> int:
    """The exit code that the command line would end with; UNEXPECTED where it would end in a traceback."""
    prctl = ctypes.CDLL(None).prctl
    # An attempt that is held would outlive a test that fails.
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # Where only a parent may trace a process, this one lets anybody.
    prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
    # What `copy_dataset` prints is not for the other side.
    os.dup2(2, 1)
    os.kill(os.getpid(), signal.SIGSTOP)
    try:
        if root.startswith(FINALIZE):
            finalize(open_root(root.removeprefix(FINALIZE)))
        else:
            copy_dataset(LocalRoot(donor), open_root(root))
    except DistillPipeError as error:
        return error.exit_code
    except BaseException as error:  # noqa: BLE001 - whatever it is, the test is told
        print(repr(error), file=sys.stderr)
        return UNEXPECTED
    return 0


def _serve() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(_attempt(sys.argv[1], line.strip()))
        os.waitpid(child, os.WUNTRACED)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    from committer import copy_dataset

    from distill_pipe.errors import DistillPipeError
    from distill_pipe.store import object_root
    from distill_pipe.store.finalize import finalize
    from distill_pipe.store.root import LocalRoot, open_root

    object_root._PART_BYTES = int(sys.argv[2])
    _serve()
