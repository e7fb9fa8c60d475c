"""Helpers for tests that run the real command line on a real target."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from distill_pipe.store.commit import adopt_shard, committed_shards
from distill_pipe.store.hidden_codec import decode_layers
from distill_pipe.store.manifest import ShardInfo, require_run
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import read_main, traces_from_table
from distill_pipe.store.sidecar import blobs_of, read_sidecar, read_sidecar_info
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
GENERATE = (*_TARGET, "--set", "sampling.max_tokens=24", "--set", "prompts_per_shard=4", "--set",
            "engine.max_num_seqs=4", "--set", "max_model_len=128")
SCORE = (*_TARGET, "--responses", "corpus", "--set", "capture.logprob_bits=24")


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
    """Every trace of a dataset with all its hidden states in float32, in ordinal order."""
    root = LocalRoot(path)
    run = require_run(root)
    for shard in sorted(committed_shards(root)):
        fragment = adopt_shard(root, run, shard)
        main = read_main(root.local(fragment.file.name), fragment.info, run.spec.capture)
        for i, trace in enumerate(traces_from_table(main)):
            if fragment.info.hidden is not None:
                trace.hidden.update(_decoded(root.local(fragment.info.hidden.name), fragment.info, i))
            yield trace


def _decoded(path: Path, info: ShardInfo, index: int) -> dict[int, np.ndarray]:
    sidecar = read_sidecar_info(path)
    blobs = blobs_of(read_sidecar(path, sidecar, sidecar.layers, info.traces, info.tokens), sidecar, index)
    return {n: h.numpy() for n, h in decode_layers(blobs, sidecar.codec, sidecar.hidden_size).items()}
