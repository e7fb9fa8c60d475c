"""The tap inside the vLLM worker: the one file that touches vLLM's internals on the worker's side.

vLLM is given `worker_cls="distill_pipe.produce.capture.CaptureCPUWorker"` (or `CaptureGPUWorker`). Between the forward
pass and sampling, the worker's rows of interest are reduced to head, tail and hidden states and handed to a
`ShardSink`, which commits whole shards from this process. The trade-off: private names of vLLM are used, so its version
is pinned and every one of them is checked by name at start-up. They are

    Worker.load_model, .execute_model(scheduler_output), .sample_tokens(grammar_output)                overridden
    worker.model_runner, .use_v2_model_runner, .vllm_config
    runner.execute_model_state.{hidden_states, aux_hidden_states, logits, scheduler_output, input_batch}
    runner.input_batch.{req_ids, num_computed_tokens_cpu}                                              V1
    state.input_batch.{req_ids, query_start_loc_np, num_computed_tokens_np}                            V2
    runner.use_aux_hidden_state_outputs, model.set_aux_hidden_state_layers, model.compute_logits
    scheduler_output.{scheduled_new_reqs, finished_req_ids, num_scheduled_tokens}

One device per engine: tensor and pipeline parallel engines are refused. Copies to the host are synchronous.

Shapes: n rows of one request in one step, N all rows of a step, R head rows, L layers, H hidden size, V vocabulary.
"""

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from distill_pipe.errors import CaptureError
from distill_pipe.produce.assembly import FinishedTrace
from distill_pipe.produce.sink import ShardSink
from distill_pipe.produce.step import Request, StepCapture, StepView, Wanted
from distill_pipe.store.manifest import FINAL_NORM, Run
from distill_pipe.store.norm import write_final_norm
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import QuarantinedPrompt

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

EXTRA_ARG = "distill_pipe"


def view_v1(runner: Any, state: Any) -> StepView:
    batch = runner.input_batch
    ids = list(batch.req_ids)
    lengths = np.array([state.scheduler_output.num_scheduled_tokens[r] for r in ids], np.int64)
    starts = batch.num_computed_tokens_cpu[:len(ids)].astype(np.int64)
    return StepView(ids, starts, lengths, state.hidden_states, state.aux_hidden_states or (), state.logits)


def view_v2(runner: Any, state: Any) -> StepView:  # noqa: ARG001 - the same signature as view_v1
    batch = state.input_batch
    ids = list(batch.req_ids)
    lengths = np.diff(batch.query_start_loc_np[:len(ids) + 1]).astype(np.int64)
    starts = np.asarray(batch.num_computed_tokens_np[:len(ids)], np.int64)
    return StepView(ids, starts, lengths, state.hidden_states, state.aux_hidden_states or (), None)


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
        layers = (self.vllm_config.additional_config or {}).get(EXTRA_ARG, {}).get("layers", ())
        _check_seams(self, bool(layers))
        if layers:
            self.model_runner.model.set_aux_hidden_state_layers(tuple(layers))
            self.model_runner.use_aux_hidden_state_outputs = True

    def execute_model(self, scheduler_output: "SchedulerOutput") -> Any:
        if self._step_capture is not None:
            _schedule(self._step_capture, scheduler_output)
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        state = self.model_runner.execute_model_state
        if self._step_capture is not None and self._sink is not None and state is not None:
            view = view_v2 if self.use_v2_model_runner else view_v1
            with torch.inference_mode():
                rows = self._step_capture.step(view(self.model_runner, state))
            if rows:
                self._sink.add(rows)
        return super().sample_tokens(grammar_output)  # type: ignore[misc]

    def capture_open(self, run: bytes, root: str) -> None:
        """RPC: start capturing for a run; its dataset is at `root`."""
        record = msgspec.json.decode(run, type=Run)
        store = LocalRoot(root)
        self._sink = ShardSink(store, record)
        seed = record.spec.sampling.seed if record.spec.sampling else 0
        self._step_capture = StepCapture(record.spec.capture, seed, self.model_runner.model.compute_logits)
        norm = getattr(getattr(self.model_runner.model, "model", None), "norm", None)
        if norm is not None and store.size(FINAL_NORM) is None:
            write_final_norm(store, norm.weight.detach().float().cpu().numpy())

    def capture_finish(self, shard: int, traces: bytes) -> None:
        """RPC: these prompts of a shard are finished."""
        self._open_sink().finish(shard, msgspec.msgpack.decode(traces, type=list[FinishedTrace]))

    def capture_commit(self, shard: int, quarantined: bytes) -> None:
        """RPC: all prompts of a shard are finished or given up on."""
        self._open_sink().commit(shard, msgspec.msgpack.decode(quarantined, type=list[QuarantinedPrompt]))

    def capture_outcomes(self) -> bytes:
        """RPC: shards decided since the last call."""
        return msgspec.msgpack.encode(self._open_sink().outcomes())

    def _open_sink(self) -> ShardSink:
        if self._sink is None:
            raise CaptureError("capture_open was not called")
        return self._sink


def _check_seams(worker: CaptureMixin, need_layers: bool) -> None:
    """Say which part of vLLM is not as expected, instead of storing nonsense.

    Raises:
        CaptureError: a name is missing, or the engine's layout is not supported.
    """
    if worker.vllm_config.parallel_config.world_size > 1:
        raise CaptureError("capture supports one device per engine; tensor and pipeline parallel are refused")
    runner, model = worker.model_runner, worker.model_runner.model
    wanted = {"model_runner": (runner, ["execute_model_state", "use_aux_hidden_state_outputs"]),
              "model": (model, ["compute_logits"] + ["set_aux_hidden_state_layers"] * need_layers)}
    if not worker.use_v2_model_runner:
        wanted["model_runner.input_batch"] = (runner.input_batch, ["req_ids", "num_computed_tokens_cpu"])
    for owner, (thing, names) in wanted.items():
        for name in names:
            if not hasattr(thing, name):
                raise CaptureError(f"this vLLM has no {owner}.{name} for {type(model).__name__}; "
                                   "use the pinned version")


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
