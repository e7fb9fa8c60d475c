"""Wrote what lies beside it, once. Golden data is never written anew: it stands for the datasets that people have.

    PYTHONPATH=tests python tests/golden/write.py v2

Run it for a new format version alone, into a folder that does not exist yet. `expected.json` holds every number as a
reader must find it, and `codecs.json` one blob per codec with the states that it decodes to.
"""

import json
import sys
from pathlib import Path
from typing import get_args

import msgspec
import torch
from runs import stored_traces
from tiny_datasets import Shape, random_trace, start_run

from distill_pipe.store.commit import commit_shard
from distill_pipe.store.finalize import finalize
from distill_pipe.store.hidden_codec import decode_hidden, encode_hidden, encode_trace
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import QuarantinedPrompt
from distill_pipe.store.spec import HiddenCodec

SHAPE = Shape(hidden_size=12, layers=(1, 4), hidden_codec="q8", top_k=8, tail_samples=2, logprob_bits=7,
              prompts_per_shard=2)


def main() -> None:
    folder = Path(__file__).parent / sys.argv[1]
    folder.mkdir()
    dataset = folder / "dataset"
    run, root = start_run(dataset, 4, SHAPE), LocalRoot(dataset)
    traces = [encode_trace(random_trace(i, SHAPE), SHAPE.hidden_codec) for i in range(4)]
    commit_shard(root, run, 0, traces[:2], [])
    commit_shard(root, run, 1, traces[2:3], [QuarantinedPrompt(3, "prompt-3", "too_long", "it is too long")])
    finalize(root)
    expected = [{name: getattr(t, name) for name in type(t).__dataclass_fields__} for t in stored_traces(dataset)]
    encoded = msgspec.json.encode(expected, enc_hook=lambda array: array.tolist())
    (folder / "expected.json").write_bytes(encoded + b"\n")
    states_NH = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    codecs = {}
    for codec in get_args(HiddenCodec):
        blob = encode_hidden(states_NH, codec)
        codecs[codec] = {"blob": bytes(blob.data).hex(),
                         "scales": None if blob.scale_T is None else blob.scale_T.tolist(),
                         "states": decode_hidden(blob, codec, 12, dtype=torch.float32).tolist()}
    (folder / "codecs.json").write_text(json.dumps(codecs) + "\n")


if __name__ == "__main__":
    main()
