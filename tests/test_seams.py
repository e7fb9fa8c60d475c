"""The parts of vLLM that capture touches are in the version it is pinned to, and in the one after it.

Catches a name that went away, an argument that was added or renamed, and a call that the tap relies on and that moved.
The sources are read as text, so a version that cannot run on this machine is checked as well; that capture works with
one is for the engine tests to say.
"""

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from remote_wheel import CANNOT_BE_REACHED

from distill_pipe.produce.engines import vllm_spec

NEXT = "0.33.0"
MOST_BYTES = 10_000_000

# File -> what must be in it. `Class.name` is a field, a method, or an attribute that a method of the class sets.
# `name(a, b=)` is a function that can be called with these arguments; `self` is left out. `name: code` says that the
# function has this expression in it.
SEAMS: dict[str, tuple[str, ...]] = {
    # the worker
    "vllm/v1/worker/worker_base.py": ("WorkerBase.vllm_config", "WorkerBase.model_runner"),
    "vllm/v1/worker/gpu_worker.py": (
        "Worker.load_model()", "Worker.execute_model(scheduler_output)", "Worker.sample_tokens(grammar_output)",
        "Worker.use_v2_model_runner", "Worker.sample_tokens: self.model_runner.sample_tokens(grammar_output)"),
    "vllm/v1/worker/cpu_worker.py": ("CPUWorker",),
    "vllm/v1/core/sched/output.py": (
        "NewRequestData.req_id", "NewRequestData.prompt_token_ids", "NewRequestData.sampling_params",
        "SchedulerOutput.scheduled_new_reqs", "SchedulerOutput.finished_req_ids",
        "SchedulerOutput.num_scheduled_tokens"),
    "vllm/v1/outputs.py": ("ModelRunnerOutput.req_ids", "ModelRunnerOutput.sampled_token_ids",
                           "SamplerOutput.sampled_token_ids"),
    # the V1 runner
    "vllm/v1/worker/gpu_model_runner.py": (
        "GPUModelRunner.model", "GPUModelRunner.sampler", "GPUModelRunner.input_batch",
        "GPUModelRunner.execute_model_state", "GPUModelRunner.use_aux_hidden_state_outputs",
        "GPUModelRunner.intermediate_tensors", "ExecuteModelState.scheduler_output", "ExecuteModelState.hidden_states",
        "ExecuteModelState.aux_hidden_states",
        "GPUModelRunner._sample: self.sampler(logits=logits, sampling_metadata=sampling_metadata)",
        "GPUModelRunner.sample_tokens: self._sample(logits, spec_decode_metadata)"),
    "vllm/v1/worker/gpu_input_batch.py": ("InputBatch.req_ids", "InputBatch.num_computed_tokens_cpu"),
    "vllm/v1/sample/sampler.py": ("Sampler.forward(logits, sampling_metadata)",
                                  "Sampler.forward: sampled.unsqueeze(-1)"),
    # the V2 runner
    "vllm/v1/worker/cpu/model_runner.py": ("CPUModelRunner",),
    "vllm/v1/worker/gpu/model_runner.py": (
        "GPUModelRunner.model", "GPUModelRunner.sampler", "GPUModelRunner.execute_model_state",
        "GPUModelRunner.use_aux_hidden_state_outputs", "GPUModelRunner.intermediate_tensors",
        "GPUModelRunner.max_num_tokens", "GPUModelRunner.device", "GPUModelRunner.pp_handler",
        "ExecuteModelState.input_batch", "ExecuteModelState.hidden_states", "ExecuteModelState.aux_hidden_states",
        "GPUModelRunner.sample: hidden_states[input_batch.logits_indices]",
        "GPUModelRunner.sample: self.model.compute_logits(sample_hidden_states)",
        "GPUModelRunner.sample: self.sampler(logits, input_batch)",
        "GPUModelRunner.sample_tokens: self.sample(hidden_states, input_batch, grammar_output)"),
    "vllm/v1/worker/gpu/input_batch.py": ("InputBatch.req_ids", "InputBatch.query_start_loc_np",
                                          "InputBatch.num_computed_tokens_np"),
    "vllm/v1/worker/gpu/sample/sampler.py": ("Sampler.__call__(logits, input_batch)",
                                             "Sampler.__call__: sampled.view(-1, 1)"),
    "vllm/v1/worker/gpu/sample/output.py": ("SamplerOutput.sampled_token_ids",),
    "vllm/v1/worker/gpu/async_utils.py": ("AsyncOutput.sampler_output", "AsyncOutput.get_output()"),
    # hidden states, over pipeline stages too
    "vllm/model_executor/models/interfaces.py": (
        "SupportsEagle3.set_aux_hidden_state_layers(layers)", "EagleModelMixin.supports_aux_hidden_states_over_pp"),
    "vllm/v1/worker/gpu/spec_decode/eagle/eagle3_utils.py": ("reserve_aux_intermediate_tensor_slots(model)",),
    "vllm/v1/worker/gpu/pp_utils.py": ("PPHandler.configure_aux_hidden_state_relay(model)",),
    "vllm/model_executor/models/deepseek_v2.py": ("DeepseekV2Model",),
    "vllm/model_executor/models/utils.py": (
        "make_empty_intermediate_tensors_factory.make_empty_intermediate_tensors(batch_size=, dtype=, device=)",),
    # the head, over parts of the vocabulary too
    "vllm/model_executor/models/llama.py": (
        "LlamaForCausalLM.model", "LlamaForCausalLM.lm_head", "LlamaForCausalLM.logits_processor",
        "LlamaForCausalLM.make_empty_intermediate_tensors", "LlamaForCausalLM.compute_logits(hidden_states)",
        "LlamaForCausalLM.compute_logits: self.logits_processor(self.lm_head, hidden_states)", "LlamaModel.norm",
        "LlamaModel.supports_aux_hidden_states_over_pp"),
    "vllm/model_executor/layers/logits_processor.py": (
        "LogitsProcessor.forward(lm_head, hidden_states, skip_gather=)",),
    "vllm/model_executor/layers/vocab_parallel_embedding.py": (
        "VocabParallelEmbedding.shard_indices", "VocabParallelEmbeddingShardIndices.org_vocab_start_index",
        "VocabParallelEmbeddingShardIndices.org_vocab_end_index",
        "VocabParallelEmbeddingShardIndices.num_org_vocab_padding"),
    "vllm/distributed/parallel_state.py": (
        "get_tp_group()", "get_pp_group()", "GroupCoordinator.world_size", "GroupCoordinator.rank_in_group",
        "GroupCoordinator.is_first_rank", "GroupCoordinator.is_last_rank"),
    "vllm/distributed/communication_op.py": ("tensor_model_parallel_all_gather(input_, dim=)",),
    # the settings that capture reads or refuses
    "vllm/config/vllm.py": (
        "VllmConfig.additional_config", "VllmConfig.model_config", "VllmConfig.parallel_config",
        "VllmConfig.speculative_config", "VllmConfig.lora_config", "VllmConfig.use_v2_model_runner"),
    "vllm/config/parallel.py": (
        "ParallelConfig.worker_cls", "ParallelConfig.data_parallel_size",
        "ParallelConfig.prefill_context_parallel_size", "ParallelConfig.enable_batch_sharded_sampling"),
    # the driver's side
    "vllm/entrypoints/llm.py": ("LLM.llm_engine",),
    "vllm/v1/engine/llm_engine.py": (
        "LLMEngine.add_request(request_id, prompt, params)", "LLMEngine.step()", "LLMEngine.has_unfinished_requests()",
        "LLMEngine.collective_rpc(method, args=)", "LLMEngine.engine_core"),
    "vllm/v1/engine/core_client.py": (
        "BackgroundResources.engine_dead", "MPClient.resources", "MPClient.utility_results",
        "SyncMPClient.outputs_queue", "SyncMPClient.call_utility: self.utility_results[call_id]",
        "SyncMPClient.get_output: self.outputs_queue.get()"),
    "vllm/v1/engine/exceptions.py": ("EngineDeadError",),
    "vllm/outputs.py": ("RequestOutput.request_id", "RequestOutput.finished", "RequestOutput.outputs",
                        "CompletionOutput.token_ids", "CompletionOutput.finish_reason"),
    "vllm/sampling_params.py": (
        "RequestOutputKind.FINAL_ONLY", "SamplingParams.extra_args", "SamplingParams.skip_reading_prefix_cache",
        "SamplingParams.output_kind", "SamplingParams.detokenize", "SamplingParams.seed"),
}


def children(node: ast.AST) -> dict[str, ast.AST]:
    """What a module, class or function holds by name; for a class, what its methods set on `self` as well."""
    found: dict[str, ast.AST] = {}
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found[child.name] = child
        for target in targets(child):
            if isinstance(target, ast.Name):
                found[target.id] = child
    if isinstance(node, ast.ClassDef):
        for child in ast.walk(node):
            found |= {target.attr: child for target in targets(child)
                      if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
                      and target.attr not in found}
    return found


def targets(node: ast.AST) -> list[ast.expr]:
    """What an assignment assigns to."""
    if isinstance(node, ast.AnnAssign):
        return [node.target]
    if not isinstance(node, ast.Assign):
        return []
    return [part for target in node.targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]


def takes(function: ast.AST, arguments: list[str]) -> bool:
    """Whether a function can be called with these arguments: `a` by position, `a=` by name."""
    if not isinstance(function, ast.FunctionDef):
        return False
    given = function.args
    positional = [a.arg for a in [*given.posonlyargs, *given.args] if a.arg not in ("self", "cls")]
    required = set(positional[:len(positional) - len(given.defaults)])
    required |= {a.arg for a, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None}
    by_name = {a.removesuffix("=") for a in arguments if a.endswith("=")}
    by_position = [a for a in arguments if not a.endswith("=")]
    return (positional[:len(by_position)] == by_position
            and by_name <= {*positional, *(a.arg for a in given.kwonlyargs)}
            and required <= {*by_position, *by_name})


def holds(function: ast.AST, code: str) -> bool:
    """Whether an expression is somewhere in a function."""
    return any(ast.unparse(node) == code for node in ast.walk(function) if isinstance(node, ast.expr))


def has(module: ast.Module, seam: str) -> bool:
    name, _, code = seam.partition(": ")
    path, called, arguments = name.partition("(")
    node: ast.AST | None = module
    for part in path.split("."):
        node = children(node).get(part)
        if node is None:
            return False
    if called and not takes(node, [a for a in arguments.removesuffix(")").split(", ") if a]):
        return False
    return not code or holds(node, code)


def missing(folder: Path, file: str) -> list[str]:
    if not (folder / file).is_file():
        return [f"the file {file}"]
    module = ast.parse((folder / file).read_text(encoding="utf-8"))
    return [seam for seam in SEAMS[file] if not has(module, seam)]


@pytest.fixture(scope="module")
def installed() -> Path:
    found = find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parents[1]


@pytest.fixture(scope="module")
def following(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the next release: a few hundred kilobytes out of a wheel of 300 MB."""
    folder = tmp_path_factory.mktemp("vllm")
    script = Path(__file__).with_name("remote_wheel.py")
    try:
        done = subprocess.run([sys.executable, script, f"vllm=={NEXT}", folder, *SEAMS], capture_output=True, text=True,
                              timeout=240)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the files of vllm {NEXT} are too slow to come")
    if done.returncode == CANNOT_BE_REACHED:
        pytest.skip(f"no files of vllm {NEXT} can be had: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < MOST_BYTES
    return folder


@pytest.mark.parametrize("file", SEAMS)
def test_the_pinned_vllm_has_what_capture_touches(file: str, installed: Path) -> None:
    assert missing(installed, file) == []


@pytest.mark.parametrize("file", SEAMS)
def test_the_next_vllm_has_what_capture_touches(file: str, following: Path) -> None:
    assert missing(following, file) == []


@pytest.mark.parametrize("file", SEAMS)
def test_a_seam_that_goes_away_is_noticed(file: str, installed: Path) -> None:
    source = (installed / file).read_text(encoding="utf-8")
    for seam in SEAMS[file]:
        last = re.findall(r"\w+", seam)[-1]
        module = ast.parse(re.sub(rf"\b{last}\b", "renamed" if last.isidentifier() else "99", source))
        assert not has(module, seam), seam


@pytest.mark.parametrize(("declared", "called", "possible"), [
    ("def f(a, b): ...", "f(a, b)", True),
    ("def f(a, b, c=1): ...", "f(a, b)", True),
    ("def f(a, b, c): ...", "f(a, b)", False),
    ("def f(b, a): ...", "f(a, b)", False),
    ("def f(a, *, b): ...", "f(a, b=)", True),
    ("def f(a, *, b): ...", "f(a)", False),
    ("def f(a, *, b=1, c=2): ...", "f(a, c=)", True),
    ("f = 1", "f()", False),
])
def test_a_call_is_possible_when_its_arguments_are_taken_and_no_other_is_needed(declared, called, possible) -> None:
    assert has(ast.parse(declared), called) is possible


def test_the_next_vllm_is_the_one_after_the_installed_one() -> None:
    major, minor, *_ = vllm_spec(2).version.split(".")
    assert NEXT.split(".")[:2] == [major, str(int(minor) + 1)]
