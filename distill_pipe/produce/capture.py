"""The tap inside the vLLM worker: the one file that touches vLLM's internals on the worker's side.

vLLM is given `worker_cls="distill_pipe.produce.capture.CaptureCPUWorker"` (or `CaptureGPUWorker`). The sampler is
wrapped: each call sees a step's raw logits, then the tokens drawn from them. With the step's states, the rows of
interest are reduced to head, tail and hidden states and handed to a `ShardSink`, which commits whole shards from this
process. The trade-off: private names of vLLM are used, so its version is pinned and every one of them is checked by
name at start-up. They are

    Worker.load_model, .execute_model(scheduler_output), .sample_tokens(grammar_output)                overridden
    worker.model_runner, .use_v2_model_runner, .vllm_config
    runner.sampler                         called with logits, [requests, V]; returns .sampled_token_ids, [requests, 1]
    runner.execute_model_state.{hidden_states, aux_hidden_states, scheduler_output, input_batch}
    runner.input_batch.{req_ids, num_computed_tokens_cpu}                                              V1
    state.input_batch.{req_ids, query_start_loc_np, num_computed_tokens_np}                            V2
    runner.use_aux_hidden_state_outputs, model.set_aux_hidden_state_layers, model.compute_logits
    scheduler_output.{scheduled_new_reqs, finished_req_ids, num_scheduled_tokens}
    get_tp_group, get_pp_group: .world_size, .rank_in_group, .is_last_rank
    model.logits_processor(lm_head, states, skip_gather=True), model.lm_head.shard_indices             TP
    tensor_model_parallel_all_gather                                                                   TP
    model.model.supports_aux_hidden_states_over_pp, reserve_aux_intermediate_tensor_slots              PP
    runner.pp_handler.configure_aux_hidden_state_relay, runner.intermediate_tensors                    PP, V2

Of the devices that run one step, the first of the last pipeline stage ships the rows. With tensor parallelism each
device reduces the logits of its own part of the vocabulary; with pipeline parallelism vLLM relays the states of earlier
stages, which only some of its models can do: the others are refused.

Shapes: N all rows of a step, R rows, n columns, H hidden size, V vocabulary (of one device), S devices.
"""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from distill_pipe.errors import CaptureError
from distill_pipe.produce.assembly import FinishedTrace
from distill_pipe.produce.head import WHOLE, VocabShard
from distill_pipe.produce.sink import ShardSink, SinkTimes
from distill_pipe.produce.step import Request, StepCapture, StepView, Wanted
from distill_pipe.store.manifest import FINAL_NORM, Run
from distill_pipe.store.norm import write_final_norm
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import QuarantinedPrompt

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

EXTRA_ARG = "distill_pipe"


def view_v1(runner: Any, state: Any, logits_nV: Tensor, sampled_n: Tensor) -> StepView:
    batch = runner.input_batch
    ids = list(batch.req_ids)
    lengths = np.array([state.scheduler_output.num_scheduled_tokens[r] for r in ids], np.int64)
    starts = batch.num_computed_tokens_cpu[:len(ids)].astype(np.int64)
    return StepView(ids, starts, lengths, state.hidden_states, state.aux_hidden_states or (), logits_nV, sampled_n)


def view_v2(runner: Any, state: Any, logits_nV: Tensor, sampled_n: Tensor) -> StepView:  # noqa: ARG001 - as view_v1
    batch = state.input_batch
    ids = list(batch.req_ids)
    lengths = np.diff(batch.query_start_loc_np[:len(ids) + 1]).astype(np.int64)
    starts = np.asarray(batch.num_computed_tokens_np[:len(ids)], np.int64)
    return StepView(ids, starts, lengths, state.hidden_states, state.aux_hidden_states or (), logits_nV, sampled_n)


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


class SamplerTap:
    """Stands in for the runner's sampler, and shows each call's logits and tokens to `watch`."""

    def __init__(self, sampler: Any, watch: Callable[[Tensor, Tensor], None]) -> None:
        self._sampler, self._watch = sampler, watch

    def __call__(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        # The samplers copy logits of other types to float32 first, and change float32 ones in place.
        raw_nV = logits.clone() if logits.dtype == torch.float32 else logits
        output = self._sampler(logits, *args, **kwargs)
        self._watch(raw_nV, output.sampled_token_ids[:, 0])
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


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
            _refuse(self.vllm_config)
            _check_seams(self, bool(layers))
            if layers:
                _deliver_states(self, tuple(layers))
        except CaptureError as error:
            # Raised here it would reach the driver from a process of vLLM's as "initialization failed"; see open.
            self._refusal = str(error)
        _receive_states(self)
        if _is_last_stage():
            self.model_runner.sampler = SamplerTap(self.model_runner.sampler, self._watch)

    def execute_model(self, scheduler_output: "SchedulerOutput") -> Any:
        if self._step_capture is not None:
            _schedule(self._step_capture, scheduler_output)
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        self._state = self.model_runner.execute_model_state if _is_last_stage() else None
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
            self._sink.add(step.rows, step.ready)

    def capture_open(self, run: bytes, root: str) -> str | None:
        """RPC: start capturing for a run; its dataset is at `root`. Returns why it cannot be, where it cannot."""
        if self._refusal is not None or not _is_last_stage():
            return self._refusal
        from vllm.distributed.parallel_state import get_tp_group

        record = msgspec.json.decode(run, type=Run)
        store, model = LocalRoot(root), self.model_runner.model
        ships = get_tp_group().rank_in_group == 0
        seed = record.spec.sampling.seed if record.spec.sampling else 0
        compute_logits, shard = _own_head(model)
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


def _is_last_stage() -> bool:
    from vllm.distributed.parallel_state import get_pp_group

    return bool(get_pp_group().is_last_rank)


def _own_head(model: Any) -> tuple[Callable[[Tensor], Tensor], VocabShard]:
    """The head over the part of the vocabulary that is on this device, and which part that is."""
    from vllm.distributed import tensor_model_parallel_all_gather
    from vllm.distributed.parallel_state import get_tp_group

    tp = get_tp_group()
    if tp.world_size == 1:
        return model.compute_logits, WHOLE
    own = model.lm_head.shard_indices

    def compute_logits(states_RH: Tensor) -> Tensor:
        # What follows the tokens of a part is padding, or tokens that an adapter added.
        logits_RV: Tensor = model.logits_processor(model.lm_head, states_RH, skip_gather=True)
        return logits_RV[:, :own.org_vocab_end_index - own.org_vocab_start_index]

    def gather(part_Rn: Tensor) -> Tensor:
        whole: Tensor = tensor_model_parallel_all_gather(part_Rn, dim=-1)
        return whole.view(len(part_Rn), tp.world_size, -1).movedim(1, 0)

    return compute_logits, VocabShard(own.org_vocab_start_index, tp.rank_in_group, gather)


def _deliver_states(worker: CaptureMixin, layers: tuple[int, ...]) -> None:
    """Have the model return the residual stream after `layers`, from earlier pipeline stages too."""
    from vllm.distributed.parallel_state import get_pp_group
    from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import reserve_aux_intermediate_tensor_slots

    runner, model = worker.model_runner, worker.model_runner.model
    stages = get_pp_group().world_size
    if stages > 1 and not getattr(getattr(model, "model", None), "supports_aux_hidden_states_over_pp", False):
        raise CaptureError(f"vLLM's {type(model).__name__} does not pass hidden states on between pipeline stages; "
                           "set engine.pipeline_parallel_size=1 (tensor_parallel_size instead), or --layers none")
    if 0 in layers and _adds_residual_to_embeddings(model):
        raise CaptureError(f"vLLM's {type(model).__name__} cannot deliver layer 0, the embeddings of the tokens; leave "
                           "it out of --layers")
    model.set_aux_hidden_state_layers(layers)
    # The V1 runner unpacks states on every stage, and only the last one has them.
    runner.use_aux_hidden_state_outputs = worker.use_v2_model_runner or _is_last_stage()
    if stages > 1:
        reserve_aux_intermediate_tensor_slots(model)
        if worker.use_v2_model_runner:
            runner.pp_handler.configure_aux_hidden_state_relay(model)


def _adds_residual_to_embeddings(model: Any) -> bool:
    """Whether the model adds a residual to the state of every layer, though before the first there is none."""
    from vllm.model_executor.models.deepseek_v2 import DeepseekV2Model

    return any(isinstance(part, DeepseekV2Model) for part in model.modules())


def _receive_states(worker: CaptureMixin) -> None:
    """Make room for what a pipeline stage gets from the one before. The V2 runner did so before the model knew of the
    states to relay; the V1 runner does it while it profiles memory, which it skips where the cache size is given."""
    from vllm.distributed.parallel_state import get_pp_group

    runner = worker.model_runner
    if not get_pp_group().is_first_rank:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=worker.vllm_config.model_config.dtype, device=runner.device)


def _refuse(config: Any) -> None:
    """Refuse what would make the captured rows other than the target's own, or leave some out.

    Raises:
        CaptureError: naming the setting.
    """
    parallel = config.parallel_config
    refused = {"speculative decoding computes rows that are thrown away": config.speculative_config is not None,
               "LoRA adapters change the target from request to request": config.lora_config is not None,
               "data parallelism inside one engine: use more workers": parallel.data_parallel_size > 1,
               "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
               "batch-sharded sampling": getattr(parallel, "enable_batch_sharded_sampling", False)}
    for reason, applies in refused.items():
        if applies:
            raise CaptureError(f"capture does not support {reason}")


def _check_seams(worker: CaptureMixin, need_layers: bool) -> None:
    """Say which part of vLLM is not as expected, instead of storing nonsense.

    Raises:
        CaptureError: a name is missing.
    """
    from vllm.distributed.parallel_state import get_tp_group

    runner, model = worker.model_runner, worker.model_runner.model
    sharded = ["logits_processor", "lm_head"] if get_tp_group().world_size > 1 and _is_last_stage() else []
    wanted = {"model_runner": (runner, ["execute_model_state", "use_aux_hidden_state_outputs", "sampler"]),
              "model": (model, ["compute_logits"] + ["set_aux_hidden_state_layers"] * need_layers + sharded)}
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
