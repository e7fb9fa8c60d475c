"""The tap inside the vLLM worker: a worker class that hands the rows of interest of every step to a `ShardSink`.

vLLM is given `worker_cls="distill_pipe.produce.capture.CaptureCPUWorker"` (or `CaptureGPUWorker`). The sampler is
wrapped: each call sees a step's raw logits, then the tokens drawn from them. With the step's states, the rows of
interest are reduced to head, tail and hidden states, and committed as whole shards from this process, so bulk data
never crosses one. What this relies on inside vLLM is in `seams.py`.

Of the devices that run one step, the first of the last pipeline stage ships the rows. With tensor parallelism each
device reduces the logits of its own part of the vocabulary; with pipeline parallelism vLLM relays the states of earlier
stages, which only some of its models can do: the others are refused. The trade-off of refusing on `capture_open` and
not while loading: the weights are loaded first, but the reason reaches the user from any process of vLLM's.

Shapes: n requests of a step, V vocabulary.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from distill_pipe.errors import CaptureError
from distill_pipe.produce.engine import FinishedTrace
from distill_pipe.produce.seams import (
    SamplerTap,
    check_seams,
    deliver_states,
    is_last_stage,
    own_head,
    receive_states,
    refuse_settings,
    view_v1,
    view_v2,
)
from distill_pipe.produce.sink import ShardSink, SinkTimes
from distill_pipe.produce.step import Request, StepCapture, Wanted
from distill_pipe.store.manifest import FINAL_NORM, Run
from distill_pipe.store.norm import write_final_norm
from distill_pipe.store.root import open_root
from distill_pipe.store.shard import QuarantinedPrompt

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

EXTRA_ARG = "distill_pipe"


class CaptureTimes(msgspec.Struct, frozen=True, array_like=True):
    """Where the time of capture went: seconds that the engine's thread spent in it (on a GPU, without what the device
    does meanwhile), and the sink's."""

    step_seconds: float
    sink: SinkTimes

    @staticmethod
    def sum(times: "Sequence[CaptureTimes]") -> "CaptureTimes":
        """All of them together."""
        parts = zip(*(msgspec.structs.astuple(t.sink) for t in times), strict=True)
        return CaptureTimes(sum(t.step_seconds for t in times), SinkTimes(*map(sum, parts)))


def _schedule(capture: StepCapture, scheduler_output: "SchedulerOutput") -> None:
    """Learn of new requests and forget finished ones."""
    for new in scheduler_output.scheduled_new_reqs:
        extra = (new.sampling_params.extra_args or {}) if new.sampling_params else {}
        if EXTRA_ARG in extra:
            wanted = msgspec.convert(extra[EXTRA_ARG], Wanted)
            capture.open(new.req_id, Request(wanted, np.asarray(new.prompt_token_ids, np.int64)))
    capture.close(scheduler_output.finished_req_ids)


class CaptureMixin:
    """Goes over vLLM's worker class; see the module docstring for what it relies on."""

    model_runner: Any
    vllm_config: Any
    use_v2_model_runner: bool

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        self._step_capture: StepCapture | None = None
        self._sink: ShardSink | None = None
        self._state: Any = None
        layers = (self.vllm_config.additional_config or {}).get(EXTRA_ARG, {}).get("layers", ())
        self._refusal: str | None = None
        try:
            refuse_settings(self.vllm_config)
            check_seams(self, bool(layers))
            if layers:
                deliver_states(self, tuple(layers))
        except CaptureError as error:
            # Raised here it would reach the driver from a process of vLLM's as "initialization failed"; see open.
            self._refusal = str(error)
        receive_states(self)
        if is_last_stage():
            self.model_runner.sampler = SamplerTap(self.model_runner.sampler, self._watch)

    def execute_model(self, scheduler_output: "SchedulerOutput") -> Any:
        if self._step_capture is not None:
            _schedule(self._step_capture, scheduler_output)
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        self._state = self.model_runner.execute_model_state if is_last_stage() else None
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if self._step_capture is not None and self._state is not None:
            raise CaptureError("vLLM ended a step without a call of its sampler; use the pinned version")
        return output

    def _watch(self, logits_nV: Tensor, sampled_n: Tensor) -> None:
        """The sampler was called; outside a step (vLLM tries it out at its start) there is nothing to capture."""
        state, self._state = self._state, None
        if state is None or self._step_capture is None:
            return
        started = time.monotonic()
        view = view_v2 if self.use_v2_model_runner else view_v1
        with torch.inference_mode():
            step = self._step_capture.step(view(self.model_runner, state, logits_nV, sampled_n))
        self._step_seconds += time.monotonic() - started
        if step is not None and self._sink is not None:
            self._sink.add(step)

    def capture_open(self, run: bytes, root: str) -> str | None:
        """RPC: start capturing for a run; its dataset is at `root`. Returns why it cannot be, where it cannot."""
        if self._refusal is not None or not is_last_stage():
            return self._refusal
        from vllm.distributed.parallel_state import get_tp_group

        record = msgspec.json.decode(run, type=Run)
        store, model = open_root(root), self.model_runner.model
        ships = get_tp_group().rank_in_group == 0
        seed = record.spec.sampling.seed if record.spec.sampling else 0
        compute_logits, shard = own_head(model)
        self._step_seconds = 0.0
        self._step_capture = StepCapture(record.spec.capture, seed, compute_logits, shard, ships=ships)
        if not ships:
            return None
        self._sink = ShardSink(store, record)
        norm = getattr(getattr(model, "model", None), "norm", None)
        if norm is not None and store.size(FINAL_NORM) is None:
            write_final_norm(store, norm.weight.detach().float().cpu().numpy())
        return None

    def capture_finish(self, shard: int, traces: bytes) -> None:
        """RPC: these prompts of a shard are finished."""
        if self._sink is not None:
            self._sink.finish(shard, msgspec.msgpack.decode(traces, type=list[FinishedTrace]))

    def capture_commit(self, shard: int, quarantined: bytes) -> None:
        """RPC: all prompts of a shard are finished or given up on."""
        if self._sink is not None:
            self._sink.commit(shard, msgspec.msgpack.decode(quarantined, type=list[QuarantinedPrompt]))

    def capture_outcomes(self) -> bytes | None:
        """RPC: shards decided since the last call; None from a device that does not ship."""
        return None if self._sink is None else msgspec.msgpack.encode(self._sink.outcomes())


    def capture_times(self) -> bytes | None:
        """RPC: `CaptureTimes` since the run was opened; None from a device that does not ship."""
        return None if self._sink is None else msgspec.msgpack.encode(
            CaptureTimes(self._step_seconds, self._sink.times()))


def __getattr__(name: str) -> type:
    """`CaptureCPUWorker` and `CaptureGPUWorker`, made on first use: importing this module selects no platform."""
    if name == "CaptureCPUWorker":
        from vllm.v1.worker.cpu_worker import CPUWorker as Base
    elif name == "CaptureGPUWorker":
        from vllm.v1.worker.gpu_worker import Worker as Base
    else:
        raise AttributeError(name)
    made = type(name, (CaptureMixin, Base), {"__module__": __name__})
    globals()[name] = made
    return made
