"""The tap inside the vLLM worker: the one file that touches vLLM's internals on the worker's side.

vLLM is given `worker_cls="distill_pipe.produce.capture.CaptureCPUWorker"` (or `CaptureGPUWorker`). Between the forward
pass and sampling, the worker's rows of interest are reduced to head, tail and hidden states and handed to a
`ShardSink`, which commits whole shards from this process. The trade-off: private names of vLLM are used, so its version
is pinned and every one of them is checked by name at start-up. They are

    Worker.load_model, .execute_model(scheduler_output), .sample_tokens(grammar_output), .shutdown     overridden
    worker.model_runner, .use_v2_model_runner, .vllm_config
    runner.execute_model_state.{hidden_states, aux_hidden_states, logits, scheduler_output, input_batch}
    runner.input_batch.{req_ids, num_computed_tokens_cpu}                                              V1
    state.input_batch.{req_ids, query_start_loc_np, num_computed_tokens_np}                            V2
    runner.use_aux_hidden_state_outputs, model.set_aux_hidden_state_layers, model.compute_logits
    scheduler_output.{scheduled_new_reqs, finished_req_ids, num_scheduled_tokens}

One device per engine: tensor and pipeline parallel engines are refused. Copies to the host are synchronous.

Shapes: n rows of one request in one step, N all rows of a step, R head rows, L layers, H hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_pipe.errors import CaptureError
from distill_pipe.produce.assembly import FinishedTrace, StepRows
from distill_pipe.produce.head import CHUNK_ROWS, head_rows, row_uniforms
from distill_pipe.produce.sink import ShardSink
from distill_pipe.store.manifest import FINAL_NORM, Run
from distill_pipe.store.norm import write_final_norm
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import QuarantinedPrompt

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

EXTRA_ARG = "distill_pipe"
NO_TOKEN = -1


class Wanted(msgspec.Struct, frozen=True, array_like=True):
    """What to capture of one request; travels in `SamplingParams.extra_args`. `row_ranges` are half-open ranges of
    positions with a head row. `last_token` follows the prompt's last token, or NO_TOKEN when the target will say."""

    ordinal: int
    row_ranges: tuple[tuple[int, int], ...]
    last_token: int


@dataclass(slots=True)
class Request:
    """A request being captured. Positions below `next_position` are captured; after a preemption they come again."""

    wanted: Wanted
    prompt_ids: NDArray[np.int64]
    next_position: int = 0

    def row_positions(self, start: int, stop: int) -> NDArray[np.int64]:
        """The positions in [start, stop) that get a head row."""
        parts = [np.arange(max(start, a), min(stop, b)) for a, b in self.wanted.row_ranges if a < stop and b > start]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def next_tokens(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The token after each position, NO_TOKEN where it is not known yet."""
        known = np.append(self.prompt_ids, self.wanted.last_token)
        return np.where(positions + 1 < len(known), known[np.minimum(positions + 1, len(known) - 1)], NO_TOKEN)


@dataclass(frozen=True, slots=True)
class StepView:
    """One step of either model runner, in batch order: request i computed `lengths[i]` positions from `starts[i]`,
    which are rows `ends[i] - lengths[i]` to `ends[i]` of the states. `logits` row i is of the request's last row."""

    request_ids: list[str]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    hidden_NH: Tensor
    aux: Sequence[Tensor]
    logits: Tensor | None


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


class StepCapture:
    """Picks the wanted rows of a step, reduces them on the device and hands them to the sink."""

    def __init__(self, run: Run, sink: ShardSink, model: Any) -> None:
        self._capture, self._seed = run.spec.capture, run.spec.sampling.seed if run.spec.sampling else 0
        self._sink, self._model = sink, model
        self._requests: dict[str, Request] = {}

    def schedule(self, scheduler_output: "SchedulerOutput") -> None:
        """Learn of new requests and forget finished ones."""
        for new in scheduler_output.scheduled_new_reqs:
            extra = (new.sampling_params.extra_args or {}) if new.sampling_params else {}
            if EXTRA_ARG in extra and new.req_id not in self._requests:
                wanted = msgspec.convert(extra[EXTRA_ARG], Wanted)
                self._requests[new.req_id] = Request(wanted, np.asarray(new.prompt_token_ids, np.int64))
        for request_id in scheduler_output.finished_req_ids:
            self._requests.pop(request_id, None)

    def step(self, view: StepView) -> None:
        """Capture one step. Called before sampling, because samplers change logits in place."""
        if self._capture.layers and len(view.aux) != len(self._capture.layers):
            raise CaptureError(f"the model delivers {len(view.aux)} hidden states, asked for were "
                               f"{len(self._capture.layers)}: it does not support them in this layout")
        segments = list(self._segments(view))
        if not segments:
            return
        head = self._head(view, segments)
        hidden_nLH = None
        if self._capture.layers:
            rows = torch.from_numpy(np.concatenate([s.state_rows for s in segments])).to(view.hidden_NH.device)
            hidden_nLH = _host(torch.stack([aux_NH[rows] for aux_NH in view.aux], dim=1))
        self._sink.add(_split(segments, head, hidden_nLH))

    def _segments(self, view: StepView) -> Iterator["Segment"]:
        """The part of the step that is wanted and not captured yet, request by request."""
        ends = np.cumsum(view.lengths)
        for i, request_id in enumerate(view.request_ids):
            request = self._requests.get(request_id)
            if request is None:
                continue
            stop = int(view.starts[i] + view.lengths[i])
            first = max(int(view.starts[i]), request.next_position)
            if first < stop:
                request.next_position = stop
                yield Segment(request, i, first, stop, int(ends[i]) - stop, request.row_positions(first, stop))

    def _head(self, view: StepView, segments: Sequence["Segment"]) -> tuple[NDArray[Any], ...]:
        """The stored part of every wanted row of the step, in segment order, on the host. The last row of a request
        takes the logits that vLLM made to sample from; the others go through the head in chunks."""
        device = view.hidden_NH.device
        uniform_R = np.concatenate([row_uniforms(self._seed, s.request.wanted.ordinal, s.positions) for s in segments])
        next_R = np.concatenate([s.request.next_tokens(s.positions) for s in segments])
        rows_R = np.concatenate([s.positions + s.offset for s in segments])
        index_R = np.concatenate([np.full(len(s.positions), s.index) for s in segments])
        last_R = np.concatenate([s.positions == s.stop - 1 for s in segments])
        reuse_R = last_R if view.logits is not None else np.zeros_like(last_R)
        order = np.argsort(reuse_R, kind="stable")
        parts = []
        for begin in range(0, len(order), CHUNK_ROWS):
            for reuse in (False, True):
                chunk = order[begin:begin + CHUNK_ROWS]
                chunk = chunk[reuse_R[chunk] == reuse]
                if len(chunk) == 0:
                    continue
                source = torch.from_numpy(index_R[chunk] if reuse else rows_R[chunk]).to(device)
                logits_RV = view.logits[source] if reuse and view.logits is not None else self._model.compute_logits(
                    view.hidden_NH[source])
                parts.append(self._reduce(logits_RV, torch.from_numpy(uniform_R[chunk]).to(device),
                                          torch.from_numpy(next_R[chunk]).to(device)))
        if not parts:
            return ()
        back = np.argsort(order, kind="stable")
        return tuple(_host(torch.cat(tensors))[back] for tensors in zip(*parts, strict=True))

    def _reduce(self, logits_RV: Tensor, uniform_R: Tensor, next_R: Tensor) -> tuple[Tensor, ...]:
        rows = head_rows(logits_RV, self._capture.top_k, self._capture.tail_samples, uniform_R)
        chosen_R = logits_RV.gather(1, next_R.clamp(min=0)[:, None]).squeeze(1).float() - rows.logsumexp_R
        return (*rows.tensors(), torch.where(next_R >= 0, chosen_R, torch.nan))


@dataclass(frozen=True, slots=True)
class Segment:
    """Positions [first, stop) of one request in a step; position p is row p + offset of the step's states."""

    request: Request
    index: int
    first: int
    stop: int
    offset: int
    positions: NDArray[np.int64]

    @property
    def state_rows(self) -> NDArray[np.int64]:
        return np.arange(self.first, self.stop) + self.offset


def _split(segments: Sequence[Segment], head: tuple[NDArray[Any], ...],
           hidden_nLH: NDArray[Any] | None) -> list[tuple[int, StepRows]]:
    """The step's arrays cut into one `StepRows` per request."""
    split, row, state = [], 0, 0
    for s in segments:
        rows, states = len(s.positions), s.stop - s.first
        hidden = None if hidden_nLH is None else hidden_nLH[state:state + states]
        fields = tuple(field[row:row + rows] for field in head) if rows else ()
        split.append((s.request.wanted.ordinal, StepRows(s.first, hidden, s.positions, fields)))
        row, state = row + rows, state + states
    return split


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
            self._step_capture.schedule(scheduler_output)
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        state = self.model_runner.execute_model_state
        if self._step_capture is not None and state is not None:
            view = view_v2 if self.use_v2_model_runner else view_v1
            with torch.inference_mode():
                self._step_capture.step(view(self.model_runner, state))
        return super().sample_tokens(grammar_output)  # type: ignore[misc]

    def capture_open(self, run: bytes, root: str) -> None:
        """RPC: start capturing for a run; its dataset is at `root`."""
        record = msgspec.json.decode(run, type=Run)
        store = LocalRoot(root)
        self._sink = ShardSink(store, record)
        self._step_capture = StepCapture(record, self._sink, self.model_runner.model)
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


def _host(tensor: Tensor) -> NDArray[Any]:
    """In host memory, bfloat16 as its bits. The callers pass fresh tensors, so nothing is shared with the engine."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    if tensor.dtype == torch.float16:
        tensor = tensor.float()
    return tensor.numpy()


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
