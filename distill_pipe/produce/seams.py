"""What capture relies on inside vLLM: the one file that reads its internals, for both model runners.

Private names are used, so vLLM's version is pinned, every name is checked when an engine starts, and a test looks for
all of them in the source of the pinned version and of the next. They are

    Worker.load_model, .execute_model(scheduler_output), .sample_tokens(grammar_output)      overridden in capture.py
    worker.model_runner, .use_v2_model_runner, .vllm_config
    runner.sampler                         called with logits, [requests, V]; returns .sampled_token_ids, [requests, 1]
    runner.execute_model_state.{hidden_states, aux_hidden_states, scheduler_output, input_batch}
    runner.input_batch.{req_ids, num_computed_tokens_cpu}                                              V1
    state.input_batch.{req_ids, query_start_loc_np, num_computed_tokens_np}                            V2
    runner.use_aux_hidden_state_outputs, model.set_aux_hidden_state_layers, model.compute_logits
    scheduler_output.{scheduled_new_reqs, finished_req_ids, num_scheduled_tokens}
    get_tp_group, get_pp_group: .world_size, .rank_in_group, .is_first_rank, .is_last_rank
    model.logits_processor(lm_head, states, skip_gather=True), model.lm_head.shard_indices             TP
    tensor_model_parallel_all_gather                                                                   TP
    model.model.supports_aux_hidden_states_over_pp, reserve_aux_intermediate_tensor_slots              PP
    runner.pp_handler.configure_aux_hidden_state_relay, runner.intermediate_tensors                    PP, V2

The trade-off of standing beside the sampler: it is the one place that both runners call with a step's logits and that
returns the tokens drawn from them, so nothing is computed twice; what the sampler changes in place has to be copied.

Shapes: N all rows of a step, n its requests, R rows, H hidden size, V vocabulary (of one device), S devices.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_pipe.errors import CaptureError
from distill_pipe.produce.head import WHOLE, VocabShard
from distill_pipe.produce.step import StepView


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


def is_last_stage() -> bool:
    from vllm.distributed.parallel_state import get_pp_group

    return bool(get_pp_group().is_last_rank)


def own_head(model: Any) -> tuple[Callable[[Tensor], Tensor], VocabShard]:
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


def deliver_states(worker: Any, layers: tuple[int, ...]) -> None:
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
    runner.use_aux_hidden_state_outputs = worker.use_v2_model_runner or is_last_stage()
    if stages > 1:
        reserve_aux_intermediate_tensor_slots(model)
        if worker.use_v2_model_runner:
            runner.pp_handler.configure_aux_hidden_state_relay(model)


def _adds_residual_to_embeddings(model: Any) -> bool:
    """Whether the model adds a residual to the state of every layer, though before the first there is none."""
    from vllm.model_executor.models.deepseek_v2 import DeepseekV2Model

    return any(isinstance(part, DeepseekV2Model) for part in model.modules())


def receive_states(worker: Any) -> None:
    """Make room for what a pipeline stage gets from the one before. The V2 runner did so before the model knew of the
    states to relay; the V1 runner does it while it profiles memory, which it skips where the cache size is given."""
    from vllm.distributed.parallel_state import get_pp_group

    runner = worker.model_runner
    if not get_pp_group().is_first_rank:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=worker.vllm_config.model_config.dtype, device=runner.device)


def refuse_settings(config: Any) -> None:
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


def check_seams(worker: Any, need_layers: bool) -> None:
    """Say which part of vLLM is not as expected, instead of storing nonsense.

    Raises:
        CaptureError: a name is missing.
    """
    from vllm.distributed.parallel_state import get_tp_group

    runner, model = worker.model_runner, worker.model_runner.model
    sharded = ["logits_processor", "lm_head"] if get_tp_group().world_size > 1 and is_last_stage() else []
    wanted = {"model_runner": (runner, ["execute_model_state", "use_aux_hidden_state_outputs", "sampler"]),
              "model": (model, ["compute_logits"] + ["set_aux_hidden_state_layers"] * need_layers + sharded)}
    if not worker.use_v2_model_runner:
        wanted["model_runner.input_batch"] = (runner.input_batch, ["req_ids", "num_computed_tokens_cpu"])
    for owner, (thing, names) in wanted.items():
        for name in names:
            if not hasattr(thing, name):
                raise CaptureError(f"this vLLM has no {owner}.{name} for {type(model).__name__}; "
                                   "use the pinned version")
