"""What a target engine must do, so that the rest of the pipeline knows no engine by name.

An engine takes requests at any time, runs them together, and commits whole shards through a sink that lives wherever
its rows are born. It is driven by repeated `step` calls from one thread; nothing here is asynchronous.

Shapes: T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from distill_pipe.produce.assembly import FinishedTrace
from distill_pipe.produce.sink import ShardOutcome
from distill_pipe.store.shard import QuarantinedPrompt


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt for the engine. An empty `loss_mask_T` means that the target writes the response."""

    ordinal: int
    token_ids_T: Sequence[int]
    loss_mask_T: Sequence[bool]


@dataclass(frozen=True, slots=True)
class Response:
    """A finished request: the tokens the target wrote, why it stopped, and its log-probability of each."""

    ordinal: int
    token_ids: Sequence[int]
    finish_reason: str
    next_logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class EngineResources:
    """What an engine may use; none of it changes a dataset's bytes. `cpu_threads` matter to CPU engines alone."""

    max_num_seqs: int = 64
    cpu_threads: int = 1


class RequestError(ValueError):
    """The engine refuses this one request; the prompt is quarantined and the others go on."""


class TargetEngine(Protocol):
    """Runs the target and captures it."""

    def add(self, request: Request) -> None:
        """Take a request. Raises RequestError when the engine refuses it."""

    def step(self) -> list[Response]:
        """Run for a little while; returns the requests that finished. Returns at once when there is nothing to run."""

    def finish(self, shard: int, traces: Sequence[FinishedTrace]) -> None:
        """Turn captured rows of finished prompts into traces."""

    def commit(self, shard: int, quarantined: Sequence[QuarantinedPrompt]) -> None:
        """Write a shard whose prompts are all finished or given up on; returns before it is written."""

    def outcomes(self) -> list[ShardOutcome]:
        """Shards decided since the last call."""
