"""What a target engine must do, so that the rest of the pipeline knows no engine by name.

An engine takes requests at any time, runs them together, and commits whole shards through a sink that lives wherever
its rows are born. It is driven by repeated `step` calls from one thread; nothing here is asynchronous. Nothing here
needs torch either, so that whoever plans or drives a run starts without it.

Shapes: T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from msgspec import Meta, Struct

from distill_pipe.store.manifest import Fragment
from distill_pipe.store.shard import QuarantinedPrompt


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt for the engine. An empty `loss_mask_T` means that the target writes the response."""

    ordinal: int
    token_ids_T: Sequence[int]
    loss_mask_T: Sequence[bool]


@dataclass(frozen=True, slots=True)
class Response:
    """A finished request: the tokens the target wrote, and why it stopped."""

    ordinal: int
    token_ids: Sequence[int]
    finish_reason: str


class FinishedTrace(Struct, frozen=True, array_like=True):
    """What the driver knows of a finished prompt."""

    ordinal: int
    prompt_id: str
    domain: str | None
    finish_reason: str
    token_ids: list[int]
    loss_mask: list[bool]


class ShardOutcome(Struct, frozen=True, array_like=True):
    """What became of a shard: its fragment, or the error (class name and message) that kept it from being committed.
    `seconds` is what the commit took."""

    shard: int
    fragment: Fragment | None
    error: str = ""
    message: str = ""
    seconds: float = 0.0


class EngineOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an engine is laid out and what it may use. The names are vLLM's own. None of it says what the dataset is, so
    all of it may differ at every start; an option that is not given is left to vLLM."""

    tensor_parallel_size: Annotated[int, Meta(ge=1)] = 1
    pipeline_parallel_size: Annotated[int, Meta(ge=1)] = 1
    enable_expert_parallel: bool = False
    distributed_executor_backend: Literal["mp", "ray"] | None = None
    max_num_seqs: Annotated[int, Meta(ge=1)] = 64
    max_num_batched_tokens: Annotated[int, Meta(ge=1)] | None = None
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)] | None = None
    kv_cache_memory_bytes: Annotated[int, Meta(ge=1)] | None = None
    enable_prefix_caching: bool = False
    enforce_eager: bool | None = None

    @property
    def devices(self) -> int:
        """How many devices one engine takes."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


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
