"""Ends the calls to an engine core that died, so that a run takes another engine instead of waiting for an answer.

vLLM 0.32 notices within a second that the process of its engine core is gone and refuses every later call, but leaves
those that already wait as they are: `SyncMPClient.call_utility` waits on a future that nobody completes, and
`get_output` on an empty queue. Private names of that client are used, like those in `seams.py` and tested with them:

    llm_engine.engine_core, SyncMPClient.{resources.engine_dead, utility_results, outputs_queue}

The trade-off is a thread that looks every POLL_SECONDS, since vLLM has nothing to wait on; an engine core inside this
process (as on CPU by default) needs none.
"""

import threading
import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, Final

POLL_SECONDS: Final = 0.5


def watch_core(llm_engine: Any) -> None:
    """Have calls to `llm_engine`'s core raise vLLM's EngineDeadError when it dies."""
    from vllm.v1.engine.core_client import SyncMPClient

    if isinstance(llm_engine.engine_core, SyncMPClient):
        threading.Thread(target=_end_calls_when_dead, args=(llm_engine.engine_core,), name="distill-pipe-core-watch",
                         daemon=True).start()


def _end_calls_when_dead(client: Any) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    while not client.resources.engine_dead:
        time.sleep(POLL_SECONDS)
    # A call registers its future before it asks whether the engine is dead, so none can slip in after this.
    futures: list[Future[Any]] = list(client.utility_results.values())
    for future in futures:
        with suppress(InvalidStateError):
            future.set_exception(EngineDeadError())
    client.outputs_queue.put_nowait(EngineDeadError())
