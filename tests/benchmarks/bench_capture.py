"""What capture costs, as ratios within one run: plain decoding, capture while the target decodes, and decoding first
with a second, captured prefill pass over the finished text. Also how far the rows of the last two differ.

One engine per dtype, rounds interleaved, medians. SmolLM2-135M; other targets have other ratios.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from runs import PROMPTS, prompt_records, stored_traces, write_corpus

from distill_pipe.produce.chat import RenderedPrompt, Renderer
from distill_pipe.produce.engine import EngineResources
from distill_pipe.produce.generate import freeze, prepare
from distill_pipe.produce.job import load_job
from distill_pipe.produce.vllm_engine import VllmEngine
from distill_pipe.produce.worker import ShardWorker
from distill_pipe.store.manifest import Run
from distill_pipe.store.plan import Message
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.spec import Responses
from distill_pipe.store.trace import Trace

# vLLM runs inside this process, and warns as it is imported.
pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("default")]

NUM_PROMPTS, MAX_TOKENS = 48, 32
SETTINGS = [f"sampling.max_tokens={MAX_TOKENS}", "capture.layers=[2, 15, 27, 30]", "capture.hidden_codec=f32",
            "capture.logprob_bits=24", f"prompts_per_shard={NUM_PROMPTS}"]


def new_run(folder: Path, name: str, corpus: Path, responses: str) -> tuple[str, LocalRoot, Run]:
    job = load_job(None, SETTINGS, {"target": "smollm2-135m", "dtype": folder.name.rpartition("-")[2],
                                    "corpus": [str(corpus)], "out": str(folder / name), "responses": responses})
    target, spec = prepare(job)
    root = LocalRoot(job.out)
    return target.model, root, freeze(root, spec, job)


def reopened(engine: VllmEngine, run: Run, root: LocalRoot) -> VllmEngine:
    """The same vLLM, capturing another run."""
    other = copy.copy(engine)
    other._run, other._sampling = run, run.spec.sampling
    other._rpc("capture_open", msgspec.json.encode(run), str(root))
    return other


def drive(engine: VllmEngine, renderer: Renderer, root: LocalRoot, run: Run) -> None:
    worker = ShardWorker(engine, renderer, root, run)
    progress = worker.advance([0], 1.0)
    while not progress.outcomes:
        progress = worker.advance([], 1.0)
    assert progress.outcomes[0].fragment is not None, progress.outcomes[0].message


def plain_decoding(engine: VllmEngine, traces: list[Trace]) -> None:
    """The same prompts and lengths through vLLM without capture."""
    from vllm import SamplingParams

    for trace in traces:
        prompt = trace.token_ids_T[:int(trace.positions_R[0]) + 1].tolist()
        params = SamplingParams(temperature=1.0, max_tokens=trace.num_rows, min_tokens=trace.num_rows,
                                seed=trace.ordinal, detokenize=False)
        engine._engine.add_request(f"plain-{trace.ordinal}", {"prompt_token_ids": prompt}, params)
    while engine._engine.has_unfinished_requests():
        engine._engine.step()


def seconds(work: Callable[[], None]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def agreement(first: list[Trace], second: list[Trace]) -> dict[str, float]:
    """Largest differences between rows captured while decoding and rows of a second pass over the same tokens."""
    largest = {"next_logprob": 0.0, "tail_mass": 0.0, "hidden_relative": 0.0, "top1_differs": 0.0}
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.token_ids_T, b.token_ids_T)
        top_a, top_b = (t.topk_ids_N.reshape(-1, 32)[:, 0] for t in (a, b))
        hidden = max(float(np.linalg.norm(a.hidden[n] - b.hidden[n]) / np.linalg.norm(a.hidden[n])) for n in a.hidden)
        found = {"next_logprob": float(np.abs(a.next_logprob_R - b.next_logprob_R).max()),
                 "tail_mass": float(np.abs(a.tail_mass_R - b.tail_mass_R).max()), "hidden_relative": hidden,
                 "top1_differs": float((top_a != top_b).mean())}
        largest = {name: max(largest[name], found[name]) for name in largest}
    return largest


def given_corpus(path: Path, renderer: Renderer, traces: list[Trace]) -> Path:
    """The finished texts as a corpus of given responses."""
    records: list[dict[str, object]] = []
    for trace, record in zip(traces, prompt_records(questions()), strict=True):
        written = trace.token_ids_T[trace.loss_mask_T]
        records.append({**record, "messages": [*record["messages"], {  # type: ignore[misc]
            "role": "assistant", "content": renderer.tokenizer.decode(written, skip_special_tokens=True)}]})
    return write_corpus(path, records)


def questions() -> list[str]:
    return [f"{PROMPTS[i % len(PROMPTS)]} ({i})" for i in range(NUM_PROMPTS)]


class Replay(Renderer):
    """Renders a prompt to exactly the tokens of an earlier trace, so that both passes see the same ids."""

    def __init__(self, renderer: Renderer, traces: list[Trace]) -> None:
        self.tokenizer, self._special = renderer.tokenizer, renderer._special
        self._traces = iter(traces)

    def render(self, messages: Sequence[Message], responses: Responses) -> RenderedPrompt:  # noqa: ARG002 - Renderer's
        trace = next(self._traces)
        return RenderedPrompt(trace.token_ids_T.tolist(), trace.loss_mask_T.tolist())


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("dtype", "rounds"), [("float32", 3), ("bfloat16", 1)])
def test_capture_while_decoding_against_a_second_pass(tmp_path_factory: pytest.TempPathFactory, dtype: str,
                                                      rounds: int) -> None:
    tmp_path = tmp_path_factory.mktemp("bench", numbered=True) / f"in-{dtype}"
    tmp_path.mkdir()
    corpus = write_corpus(tmp_path / "c.jsonl", prompt_records(questions()))
    model, root, run = new_run(tmp_path, "warm", corpus, "target")
    engine, renderer = VllmEngine(model, None, run, root, EngineResources()), Renderer(model)
    drive(engine, renderer, root, run)
    given = given_corpus(tmp_path / "given.jsonl", renderer, list(stored_traces(root.path)))
    taken: dict[str, list[float]] = {"plain": [], "captured": [], "second pass": []}
    for i in range(rounds):
        _, decoded_root, decoded_run = new_run(tmp_path, f"decoded-{i}", corpus, "target")
        captured = reopened(engine, decoded_run, decoded_root)
        taken["captured"].append(seconds(lambda: drive(captured, renderer, decoded_root, decoded_run)))  # noqa: B023
        traces = list(stored_traces(decoded_root.path))
        taken["plain"].append(seconds(lambda: plain_decoding(engine, traces)))  # noqa: B023
        _, scored_root, scored_run = new_run(tmp_path, f"scored-{i}", given, "corpus")
        scoring = reopened(engine, scored_run, scored_root)
        replay = Replay(renderer, traces)
        taken["second pass"].append(seconds(lambda: drive(scoring, replay, scored_root, scored_run)))  # noqa: B023
    median = {name: statistics.median(values) for name, values in taken.items()}
    print(json.dumps({
        "dtype": dtype, "rows": sum(t.num_rows for t in traces), "tokens": sum(t.num_tokens for t in traces),
        "seconds": {name: [round(v, 2) for v in values] for name, values in taken.items()},
        "captured / plain": round(median["captured"] / median["plain"], 3),
        "(plain + second pass) / plain": round(1 + median["second pass"] / median["plain"], 3),
        "rows differ by at most": agreement(traces, list(stored_traces(scored_root.path)))}, indent=1))
