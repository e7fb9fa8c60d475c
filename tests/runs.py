"""Helpers for tests that run the real command line on a real target."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from distill_pipe.store.commit import adopt_shard, committed_shards
from distill_pipe.store.manifest import require_run
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import read_sidecar_info, read_table, traces_from_tables
from distill_pipe.store.trace import Trace

PROMPTS = (
    "What is the capital of France?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Tell me a short story about a lighthouse keeper and a whale.",
    "Explain why the sky is blue to a five year old.",
    "List three uses of baking soda.",
    "Translate to German: the cat sleeps on the warm stone.",
)
LONG_PROMPT = "Repeat after me: " + "far too long " * 100
LAYERS = (0, 2, 15, 30)
_TARGET = ("--target", "smollm2-135m", "--layers", ",".join(map(str, LAYERS)), "--hidden-codec", "f32")
GENERATE = (*_TARGET, "--set", "sampling.max_tokens=24", "--set", "prompts_per_shard=4", "--set", "max_num_seqs=4",
            "--set", "max_model_len=128")
SCORE = (*_TARGET, "--responses", "corpus", "--set", "capture.logprob_grid=0")


def command(*args: object, env: dict[str, str] | None = None, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run `distill-pipe` as a user would, in a process of its own."""
    line = [sys.executable, "-c", "from distill_pipe.cli import main; main()", *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})})


def succeed(*args: object) -> subprocess.CompletedProcess[str]:
    """`command` that must end well."""
    done = command(*args)
    assert done.returncode == 0, done.stderr
    return done


def write_corpus(path: Path, records: Sequence[dict[str, object]]) -> Path:
    """A JSONL corpus."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prompt_records(prompts: Sequence[str] = PROMPTS) -> list[dict[str, object]]:
    return [{"id": f"p{i}", "messages": [{"role": "user", "content": p}]} for i, p in enumerate(prompts)]


def stored_traces(path: Path) -> Iterator[Trace]:
    """Every trace of a dataset with all its hidden states, in ordinal order."""
    root = LocalRoot(path)
    run = require_run(root)
    for shard in sorted(committed_shards(root)):
        info = adopt_shard(root, run, shard).info
        hidden = None if info.hidden is None else root.local(info.hidden.name)
        yield from traces_from_tables(read_table(root.local(adopt_shard(root, run, shard).file.name)),
                                      None if hidden is None else read_table(hidden),
                                      None if hidden is None else read_sidecar_info(hidden))
