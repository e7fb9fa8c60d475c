"""A process for a test: commits one shard of random states, and prints the bytes of its blobs and those of memory that
the commit took beyond them.

    python heavy_commit.py ROOT CODEC MEBIBYTES TRACES

Shapes: T tokens, V vocabulary, H hidden size.
"""

import sys
from pathlib import Path
from typing import get_args

import numpy as np
from feeder import memory
from tiny_datasets import Shape, start_run, trace_from_logits

from distill_pipe.store.codec import HiddenBlob, bytes_per_element, has_scale
from distill_pipe.store.commit import commit_shard
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.sidecar import EncodedTrace
from distill_pipe.store.spec import HiddenCodec

LAYERS, WIDTH, ROWS = (1, 2, 3, 4), 1024, 50


def encoded(ordinal: int, num_tokens: int, codec: HiddenCodec) -> EncodedTrace:
    """A trace with few supervised rows; its states are the same 64 again and again, so that zstd takes no time."""
    random = np.random.default_rng(ordinal)
    shape = Shape(layers=())
    logits_TV = random.normal(0, 2, (num_tokens, shape.vocab_size)).astype(np.float32)
    trace = trace_from_logits(ordinal, random.integers(0, shape.vocab_size, num_tokens, np.int32),
                              np.arange(num_tokens) > num_tokens - ROWS, logits_TV, {}, shape)
    blobs = {}
    for layer in LAYERS:
        states = random.normal(0, 1, (64, WIDTH)).astype(np.float32)
        raw = states if bytes_per_element(codec) == 4 else np.round(states * 20).astype(np.int8)
        scale_T = np.ones(num_tokens - 1, np.float32) if has_scale(codec) else None
        blobs[layer] = HiddenBlob(np.resize(raw, (num_tokens - 1, WIDTH)).tobytes(), scale_T)
    return EncodedTrace(trace, blobs)


def main() -> None:
    [codec] = [c for c in get_args(HiddenCodec) if c == sys.argv[2]]
    mebibytes, traces = int(sys.argv[3]), int(sys.argv[4])
    num_tokens = 1 + (mebibytes << 20) // (traces * len(LAYERS) * WIDTH * bytes_per_element(codec))
    run = start_run(Path(sys.argv[1]), traces, Shape(layers=LAYERS, hidden_size=WIDTH, hidden_codec=codec,
                                                     prompts_per_shard=traces))
    held = [encoded(o, num_tokens, codec) for o in range(traces)]
    before = memory("VmRSS")
    commit_shard(LocalRoot(sys.argv[1]), run, 0, held, [])
    print(sum(len(b.data) for t in held for b in t.blobs.values()), memory("VmHWM") - before)


if __name__ == "__main__":
    main()
