"""What capture costs on a real target, as ratios of wall time within one run, rounds interleaved, medians.

Plain vLLM is the same engine with the same requests and lengths, without capture, and with the model told to return no
hidden states. Beside it are vLLM's own means: log-probabilities of the 20 likeliest tokens (the most it gives unless
told otherwise), for sampled tokens or for the prompt, in its cheapest form. The bare head is the product of the states
with lm_head, for as many rows and in chunks of the same size, which nothing that wants logits can do without.

SmolLM2-135M in float32; a target with a smaller vocabulary for its size costs less.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from format_data import demo, machine, print_table
from runs import write_corpus

from distill_pipe.produce.chat import Renderer
from distill_pipe.produce.gauge import RecordingEngine, capture_all, questions_corpus, run_plain
from distill_pipe.produce.generate import freeze, prepare
from distill_pipe.produce.job import Job, load_job
from distill_pipe.produce.sizes import CHUNK_ROWS
from distill_pipe.store.manifest import Run
from distill_pipe.store.root import LocalRoot

# vLLM runs inside this process, and warns as it is imported.
pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("default"), pytest.mark.timeout(2400)]

LAYERS, ROUNDS = [2, 15, 27, 30], 3
PROMPTS, MAX_TOKENS, TEXTS, TEXT_TOKENS = 64, 96, 32, 512
# A shard of 16 prompts is done while the others run, as in a run of many shards.
PER_SHARD = 16


class Bench:
    """One engine with everything that is timed on it; the rounds of each are kept by name."""

    def __init__(self, folder: Path, corpus: Path, settings: list[str]) -> None:
        self._folder, self._corpus, self._settings, self._made = folder, corpus, settings, 0
        job = self._job(LAYERS)
        target, self._spec = prepare(job)
        root = LocalRoot(job.out)
        run = freeze(root, self._spec, job)
        self.engine = RecordingEngine(target.model, target.revision, run, root, job.engine)
        self._renderer = Renderer(target.model, target.revision)
        self.seconds: dict[str, list[float]] = {}
        capture_all(self.engine, self._renderer, run, root)

    def _job(self, layers: list[int]) -> Job:
        self._made += 1
        return load_job(None, [f"prompts_per_shard={PER_SHARD}", f"capture.layers={layers}", *self._settings],
                        {"target": "smollm2-135m", "corpus": [str(self._corpus)],
                         "out": str(self._folder / f"run-{self._made}")})

    def captured(self, name: str, layers: list[int]) -> None:
        """Run and commit everything once more, keeping hidden states after `layers`."""
        job = self._job(layers)
        _, spec = prepare(job)
        root = LocalRoot(job.out)
        run: Run = freeze(root, spec, job)
        self.engine.open(run, root)
        with self.states_after(layers):
            self._took(name, lambda: capture_all(self.engine, self._renderer, run, root))

    def plain(self, name: str, **more: Any) -> None:
        with self.states_after([]):
            self._took(name, lambda: run_plain(self.engine, **more))

    def bare_head(self, name: str) -> None:
        rows = self.rows
        self._took(name, lambda: self.engine._engine.collective_rpc(_bare_head, args=(rows,))[0])

    @property
    def rows(self) -> int:
        return sum(sum(done.loss_mask[1:]) for done in self.engine.finished)

    @property
    def tokens(self) -> int:
        return sum(len(done.token_ids) for done in self.engine.finished)

    @contextmanager
    def states_after(self, layers: list[int]) -> Iterator[None]:
        self.engine._engine.collective_rpc(_return_states, args=(layers,))
        yield
        self.engine._engine.collective_rpc(_return_states, args=(LAYERS,))

    def _took(self, name: str, work: Callable[[], float]) -> None:
        self.seconds.setdefault(name, []).append(work())

    def print(self, title: str, base: str, limits: dict[str, str]) -> None:
        rows = [(name, f"{statistics.median(taken):.2f}", f"{self.ratio(name, base):.3f}",
                 " ".join(f"{a / b:.3f}" for a, b in zip(taken, self.seconds[base], strict=True)),
                 limits.get(name, "")) for name, taken in self.seconds.items()]
        print_table(f"{title}. {machine()}, {torch.get_num_threads()} thread(s) for the engine",
                    ("", "seconds", f"over {base}", "in each round", "wanted"), rows)

    def ratio(self, name: str, base: str) -> float:
        """The median over rounds of one time over another."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True))


def _return_states(worker: Any, layers: list[int]) -> None:
    worker.model_runner.model.set_aux_hidden_state_layers(tuple(layers))
    worker.model_runner.use_aux_hidden_state_outputs = bool(layers)


def _bare_head(worker: Any, rows: int) -> float:
    model = worker.model_runner.model
    states_RH = torch.randn(CHUNK_ROWS, model.config.hidden_size, dtype=next(model.parameters()).dtype)
    started = time.monotonic()
    with torch.inference_mode():
        for first in range(0, rows, CHUNK_ROWS):
            model.compute_logits(states_RH[:min(CHUNK_ROWS, rows - first)])
    return time.monotonic() - started


def test_capture_while_the_target_writes(tmp_path: Path) -> None:
    corpus = questions_corpus(tmp_path / "c.jsonl", PROMPTS)
    bench = Bench(tmp_path, corpus, [f"sampling.max_tokens={MAX_TOKENS}"])
    for _ in range(ROUNDS):
        bench.captured("K=32, M=8, four layers", LAYERS)
        bench.plain("plain")
        bench.captured("K=32, M=8", [])
        bench.plain("vLLM, logprobs=20", logprobs=20)
    bench.print(f"Generating: {PROMPTS} prompts, {bench.rows} rows, {bench.tokens} tokens", "plain",
                {"K=32, M=8, four layers": "1.05"})
    hidden = bench.ratio("K=32, M=8, four layers", "K=32, M=8")
    print(f"\nHidden states alone (four layers over none): {hidden:.3f}, wanted 1.04")


def test_capture_of_given_texts(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", texts())
    bench = Bench(tmp_path, corpus, ["responses=corpus", f"max_model_len={2 * TEXT_TOKENS}"])
    for _ in range(ROUNDS):
        bench.captured("K=32, M=8, four layers", LAYERS)
        bench.plain("plain")
        bench.captured("K=32, M=8", [])
        bench.bare_head("bare lm_head product")
        bench.plain("vLLM, prompt_logprobs=20", prompt_logprobs=20)
    both = [a + b for a, b in zip(bench.seconds["plain"], bench.seconds["bare lm_head product"], strict=True)]
    bench.seconds["plain and product"] = both
    bench.print(f"Scoring: {TEXTS} texts, {bench.rows} rows of {bench.tokens} tokens", "plain", {})
    for name in ("K=32, M=8, four layers", "K=32, M=8"):
        print(f"\n{name}, over plain and product: {bench.ratio(name, 'plain and product'):.3f}, wanted 1.15")
    hidden = bench.ratio("K=32, M=8, four layers", "K=32, M=8")
    print(f"\nHidden states alone (four layers over none): {hidden:.3f}, wanted 1.04")


def test_a_third_of_the_rows_costs_a_third(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", texts(supervised=1 / 3))
    bench = Bench(tmp_path, corpus, ["responses=corpus", f"max_model_len={2 * TEXT_TOKENS}"])
    for _ in range(ROUNDS):
        bench.captured("K=32, M=8", [])
        bench.plain("plain")
        bench.bare_head("bare lm_head product")
    bench.seconds["capture, without plain"] = [
        a - b for a, b in zip(bench.seconds["K=32, M=8"], bench.seconds["plain"], strict=True)]
    bench.print(f"Scoring the last third: {TEXTS} texts, {bench.rows} rows of {bench.tokens} tokens", "plain", {})


def test_memory_over_plain(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", texts())
    bench = Bench(tmp_path, corpus, ["responses=corpus", f"max_model_len={2 * TEXT_TOKENS}"])
    peaks: dict[str, int] = {}
    runs = {"plain": lambda: bench.plain("plain"), "captured": lambda: bench.captured("captured", LAYERS)}
    for name, work in runs.items():
        Path("/proc/self/clear_refs").write_text("5")
        work()
        peaks[name] = _peak_bytes()
    shard = max(p.stat().st_size for p in tmp_path.rglob("*.parquet"))
    chunk = CHUNK_ROWS * 49_152 * 4
    print(f"\nPeak memory: plain {peaks['plain'] / 2**20:.0f} MiB, captured {peaks['captured'] / 2**20:.0f} MiB, over "
          f"it {(peaks['captured'] - peaks['plain']) / 2**20:.0f} MiB; a chunk of logits is {chunk / 2**20:.0f} MiB, a "
          f"shard's largest file {shard / 2**20:.0f} MiB")


def _peak_bytes() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) << 10


def texts(supervised: float = 1.0) -> list[dict[str, object]]:
    """Conversations of about `TEXT_TOKENS` tokens, of which a part is the assistant's."""
    words = " ".join(str(record["messages"][0]["content"]) for record in islice(demo().chat_prompts(), 400)).split()
    records: list[dict[str, object]] = []
    for i in range(TEXTS):
        part = words[i * 330:(i + 1) * 330]
        cut = round(len(part) * (1 - supervised))
        records.append({"messages": [{"role": "user", "content": " ".join(part[:cut]) or "Go on."},
                                     {"role": "assistant", "content": " ".join(part[cut:])}]})
    return records
