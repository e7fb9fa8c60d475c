"""vLLM's V2 model runner, which captures on every GPU, run on CPU through the real command and checked row by row.

Catches a batch read in the scheduler's order instead of the runner's, positions off by a chunk of a prompt, rows lost
or doubled when a request is preempted, rows of a step that async scheduling ran ahead of, and states that a pipeline
stage does not pass on. The kernels run in Triton's interpreter (see v2_runner/sitecustomize.py).
Shapes: T tokens, R rows, H hidden size, V vocabulary, N head entries.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from byte_target import LAYERS, make_byte_target
from runs import command, prompt_records, stored_traces, write_corpus

from distill_pipe.store.trace import Trace

pytestmark = pytest.mark.engine

STORED = (0, 2, LAYERS)
# A GPU's settings, which vLLM turns off on CPU.
GPU_SCHEDULER = {"async_scheduling": True, "enable_chunked_prefill": True, "long_prefill_token_threshold": 40}
BUDGET = 64
# A block of 128 tokens takes 256 KiB. Four responses need eight of them and get five.
FIVE_BLOCKS = 6 * 2 * LAYERS * 64 * 4 * 128
GIVEN: list[dict[str, object]] = [
    {"messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."},
                  {"role": "user", "content": "Another one, please."},
                  {"role": "assistant", "content": "Green, like the moss on an old wall."}]},
    {"prompt": "Count to ten.", "completion": "One, two, three, four, five, six, seven, eight, nine, ten."},
    {"prompt": "Say it again. " * 9, "completion": "No."},
]


class Step(msgspec.Struct, frozen=True):
    """What v2_runner/sitecustomize.py writes down of a step. Lists are in the runner's batch order."""

    runner: str
    output: str
    async_scheduling: bool
    requests: list[str]
    starts: list[int]
    tokens: list[int]
    unfinished_prompts: int


@dataclass(frozen=True)
class Ran:
    """What a command stored, and the V2 runner's steps on the way."""

    traces: list[Trace]
    steps: list[Step] = field(default_factory=list)

    @property
    def restarts(self) -> int:
        """How often a request started over."""
        found, reached = 0, dict[str, int]()
        for step in self.steps:
            for request, start, tokens in zip(step.requests, step.starts, step.tokens, strict=True):
                found += start < reached.get(request, 0)
                reached[request] = start + tokens
        return found


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_target(tmp_path_factory.mktemp("target"))


def run(target: Path, folder: Path, corpus: list[dict[str, object]], *settings: str, v2: bool = True,
        scheduler: dict[str, object] | None = None) -> Ran:
    write_corpus(folder / "c.jsonl", corpus)
    environment = {"OMP_NUM_THREADS": "1"}
    if v2:
        shim = Path(__file__).with_name("v2_runner")
        environment |= {
            "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "V2_RUNNER_TRACE": str(folder / "steps"),
            "V2_RUNNER_SCHEDULER": json.dumps(scheduler or {}),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(shim), os.environ.get("PYTHONPATH")]))}
    options = [part for setting in (*settings, "capture.logprob_bits=24", "max_model_len=256", "engine.max_num_seqs=4")
               for part in ("--set", setting)]
    done = command("generate", "--target", target, "--corpus", folder / "c.jsonl", "--out", folder / "out", "--layers",
                   ",".join(map(str, STORED)), "--hidden-codec", "f32", *options, env=environment)
    assert done.returncode == 0, done.stderr
    lines = (folder / "steps").read_text().splitlines() if v2 else []
    return Ran(list(stored_traces(folder / "out")), [msgspec.json.decode(line, type=Step) for line in lines])


WRITE = ("sampling.max_tokens=100", "sampling.seed=5", "prompts_per_shard=4")
SCORE = ("responses=corpus", f"engine.max_num_batched_tokens={BUDGET}")


@pytest.fixture(scope="module")
def written(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Responses that the target wrote at temperature 1."""
    return run(target, tmp_path_factory.mktemp("written"), prompt_records(), *WRITE)


@pytest.fixture(scope="module")
def hurried(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The same responses written with a GPU's settings, and with too little memory for all that run at a time."""
    return run(target, tmp_path_factory.mktemp("hurried"), prompt_records(), *WRITE,
               f"engine.kv_cache_memory_bytes={FIVE_BLOCKS}", scheduler=GPU_SCHEDULER)


@pytest.fixture(scope="module")
def scored(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Given responses, with steps of so few tokens that every prompt is cut."""
    return run(target, tmp_path_factory.mktemp("scored"), GIVEN, *SCORE)


@pytest.fixture(scope="module")
def transformers_model(target: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()


def assert_equal_to_transformers(trace: Trace, model: torch.nn.Module) -> None:
    states: dict[int, torch.Tensor] = {}
    hook = model.model.norm.register_forward_pre_hook(lambda _m, args: states.update({LAYERS: args[0][0]}))
    with torch.inference_mode():
        out = model(torch.from_numpy(trace.token_ids_T.astype(np.int64))[None], output_hidden_states=True)
    hook.remove()
    logprobs_TV = out.logits[0].log_softmax(-1).numpy()
    head_N = logprobs_TV[np.repeat(trace.positions_R, trace.topk_counts_R), trace.topk_ids_N]
    np.testing.assert_allclose(trace.topk_logprobs_N, head_N, atol=2e-4, rtol=0)
    next_R = logprobs_TV[trace.positions_R, trace.token_ids_T[trace.positions_R + 1]]
    np.testing.assert_allclose(trace.next_logprob_R, next_R, atol=2e-4, rtol=0)
    for layer in STORED:
        wanted_TH = states.get(layer, out.hidden_states[layer][0])[:-1].numpy()
        error = np.linalg.norm(trace.hidden[layer] - wanted_TH) / np.linalg.norm(wanted_TH)
        assert error <= 1e-4, f"layer {layer}"


def test_the_v2_runner_made_every_row_and_was_driven_as_each_test_says(written, hurried, scored) -> None:
    for ran in (written, hurried, scored):
        assert {s.runner for s in ran.steps} == {"vllm.v1.worker.cpu.model_runner.CPUModelRunner"}
        assert {s.output for s in ran.steps} == {"AsyncOutput"}
        assert sum(sum(s.tokens) for s in ran.steps) >= sum(t.num_tokens - 1 for t in ran.traces)
        # Shortest part first: not the order in which the scheduler names its requests.
        assert any(s.requests != sorted(s.requests, key=lambda r: int(r.split("-")[0])) for s in ran.steps)
    assert not any(s.async_scheduling or s.unfinished_prompts for s in written.steps)
    assert written.restarts == 0
    assert all(s.async_scheduling for s in hurried.steps)
    assert any(s.unfinished_prompts for s in hurried.steps)
    assert hurried.restarts > 0
    assert any(s.unfinished_prompts for s in scored.steps)
    assert max(sum(s.tokens) for s in scored.steps) <= BUDGET


@pytest.mark.parametrize("dataset", ["written", "hurried", "scored"])
def test_rows_that_the_v2_runner_captured_equal_transformers(dataset, transformers_model, request) -> None:
    traces = request.getfixturevalue(dataset).traces
    assert len(traces) == (len(GIVEN) if dataset == "scored" else len(prompt_records()))
    for trace in traces:
        assert_equal_to_transformers(trace, transformers_model)


def test_responses_and_rows_do_not_depend_on_how_the_v2_runner_is_driven(written, hurried) -> None:
    for calm, hasty in zip(written.traces, hurried.traces, strict=True):
        assert_same(calm, hasty)


def test_both_runners_store_the_same_of_given_responses(target, tmp_path, scored) -> None:
    for v1, v2 in zip(run(target, tmp_path, GIVEN, *SCORE, v2=False).traces, scored.traces, strict=True):
        assert_same(v1, v2)


@pytest.mark.layouts
@pytest.mark.parametrize("layout", ["tensor_parallel_size=2", "pipeline_parallel_size=3"])
def test_rows_that_several_devices_captured_equal_transformers(target, tmp_path, transformers_model, layout) -> None:
    # With three stages, the one in the middle has to pass on the states of the first.
    ran = run(target, tmp_path, prompt_records(), "sampling.max_tokens=30", f"engine.{layout}", scheduler=GPU_SCHEDULER)
    devices = int(layout[-1])
    assert len(ran.steps) % devices == 0
    assert sum(sum(s.tokens) for s in ran.steps) >= devices * sum(t.num_tokens - 1 for t in ran.traces)
    assert all(s.async_scheduling for s in ran.steps)
    assert len(ran.traces) == len(prompt_records())
    for trace in ran.traces:
        assert_equal_to_transformers(trace, transformers_model)


def assert_same(ours: Trace, theirs: Trace) -> None:
    assert ours.token_ids_T.tolist() == theirs.token_ids_T.tolist()
    assert ours.finish_reason == theirs.finish_reason
    assert ours.topk_ids_N.tolist() == theirs.topk_ids_N.tolist()
    assert ours.tail_ids_N.tolist() == theirs.tail_ids_N.tolist()
    for name in ("topk_logprobs_N", "tail_logprobs_N", "next_logprob_R", "logsumexp_R", "tail_mass_R"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-4, rtol=0, err_msg=name)
    for layer in STORED:
        np.testing.assert_allclose(ours.hidden[layer], theirs.hidden[layer], atol=1e-4, rtol=1e-4)
