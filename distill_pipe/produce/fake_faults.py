"""Prompts that harm the fake engine: a hook for tests, dead unless DISTILL_PIPE_FAKE_FAULTS is set.

A prompt whose text holds one of these does to its engine, as soon as it runs, what inputs have done to real ones:

    [fault:exit]      the process ends                     [fault:refuse]    this one request is refused
    [fault:kill]      SIGKILL, as from an OOM killer       [fault:nan]       a captured value is not a number
    [fault:raise]     the engine raises                    [fault:memory]    memory runs out
    [fault:hang]      the engine never answers again
"""

import os
import resource
import signal
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_pipe.errors import EngineError
from distill_pipe.produce.engine import RequestError
from distill_pipe.produce.fake_target import text_of

_ROOM_BYTES = 256 << 20


def faults_enabled() -> bool:
    """Whether prompts may do harm in this process."""
    return bool(os.environ.get("DISTILL_PIPE_FAKE_FAULTS"))


def refuse(token_ids: Sequence[int]) -> None:
    """Raise RequestError for a prompt that asks for it."""
    if "[fault:refuse]" in text_of(token_ids):
        raise RequestError("the prompt asks to be refused")


def strike(token_ids: Sequence[int]) -> None:
    """Do the harm that a prompt asks for when it starts to run."""
    text = text_of(token_ids)
    if "[fault:exit]" in text:
        os._exit(1)
    if "[fault:kill]" in text:
        os.kill(os.getpid(), signal.SIGKILL)
    if "[fault:hang]" in text:
        time.sleep(86400)
    if "[fault:raise]" in text:
        raise EngineError("the fake engine died: a prompt asked for it")
    if "[fault:memory]" in text:
        _exhaust_memory()


def spoil(token_ids: Sequence[int], head: Sequence[NDArray[Any]]) -> None:
    """Put a NaN into the captured rows of a prompt that asks for it; `head` follows `HeadRows.tensors()`."""
    if "[fault:nan]" in text_of(token_ids):
        head[2][0] = np.nan


def _exhaust_memory() -> None:
    """Fill what this process may have, which is made little more than it has, so that the machine is not harmed."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + _ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    held = []
    try:
        while True:
            held.append(bytearray(16 << 20))
    except MemoryError as error:
        raise EngineError(f"the fake engine died: {error!r} after {len(held) * 16} MiB") from None
