"""Wrote what lies beside it, once. Golden data is never written anew: it stands for the datasets that people have.

    PYTHONPATH=tests python tests/golden/write.py v2

Run it for a new format version alone, into a folder that does not exist yet. `expected.json` holds every number as a
reader must find it, and `codecs.json` one blob per codec with the states that it decodes to.

Shapes: T tokens, V vocabulary, N rows of a blob.
"""

import json
import sys
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import torch
from runs import stored_traces

from distill_pipe.produce.head import HeadReducer, row_uniforms
from distill_pipe.store.card import write_card
from distill_pipe.store.commit import commit_shard
from distill_pipe.store.finalize import finalize
from distill_pipe.store.hidden_codec import decode_hidden, encode_hidden, encode_trace
from distill_pipe.store.manifest import RUN, FileRef, Run, encode_record
from distill_pipe.store.norm import write_final_norm
from distill_pipe.store.plan import Message, PlannedPrompt, write_plan_part
from distill_pipe.store.root import LocalRoot, sha256_of
from distill_pipe.store.shard import QuarantinedPrompt
from distill_pipe.store.spec import (
    CaptureSpec,
    CorpusFile,
    CorpusSpec,
    EngineSpec,
    HiddenCodec,
    RunSpec,
    SamplingSpec,
    TargetSpec,
)
from distill_pipe.store.trace import Trace

VOCAB, WIDTH = 64, 12
# Adaptive heads, a codec with scales, floats that JSON writers spell differently, embeddings and the last layer.
CAPTURE = CaptureSpec(top_k=8, coverage=0.9, tail_samples=2, layers=(0, 4), hidden_codec="q8", logprob_bits=7)
SPEC = RunSpec(
    target=TargetSpec(name="tiny/ziel-é", revision="sha256:" + "0" * 64, architecture="TinyForCausalLM",
                      dtype="bfloat16", vocab_size=VOCAB, hidden_size=WIDTH, num_layers=4, final_norm_eps=1e-5,
                      tokenizer_sha256="0" * 64),
    corpus=CorpusSpec(files=(CorpusFile(name="c.jsonl", sha256="1" * 64),), prompts=5), responses="target",
    sampling=SamplingSpec(temperature=1.0, top_p=0.95, max_tokens=12, seed=7), capture=CAPTURE,
    engine=EngineSpec(name="none", version="0", max_model_len=64), prompts_per_shard=2)
PROMPTS = [PlannedPrompt(i, f"prompt-{i}-é", ("general", None)[i % 2], (Message("user", f"Hello, {i}?"),))
           for i in range(5)]


def start(root: LocalRoot) -> Run:
    with root.scratch() as folder:
        write_plan_part(folder / "plan", [PROMPTS[:2], PROMPTS[2:4], PROMPTS[4:]])
        plan = FileRef(name="plan/part-000.parquet", sha256=sha256_of(folder / "plan"),
                       size=(folder / "plan").stat().st_size)
        root.publish(folder / "plan", plan.name)
    run = Run(fingerprint=SPEC.fingerprint, spec=SPEC, plan=(plan,), created_by="golden",
              created_at="2026-11-24T00:00:00+00:00")
    root.create_bytes(encode_record(run), RUN)
    write_card(root, run)
    write_final_norm(root, np.linspace(0.5, 1.5, WIDTH).astype(np.float32))
    return run


def trace_of(prompt: PlannedPrompt) -> Trace:
    """A trace of random logits, reduced as a capture reduces them; one row of prompt 0 has no tail at all."""
    random = np.random.default_rng(prompt.ordinal)
    num_tokens = int(random.integers(6, 14))
    mask_T = np.arange(num_tokens) >= 3
    logits_TV = torch.from_numpy(random.normal(0, 2.5, (num_tokens, VOCAB)).astype(np.float32))
    if prompt.ordinal == 0:
        logits_TV[4, 17] = 500.0
    positions_R = np.flatnonzero(mask_T[1:])
    tokens_T = random.integers(0, VOCAB, num_tokens).astype(np.int32)
    rows = HeadReducer(CAPTURE).rows(
        logits_TV[positions_R], torch.from_numpy(row_uniforms(7, prompt.ordinal, positions_R)),
        torch.from_numpy(tokens_T[positions_R + 1].astype(np.int64)))
    head_RK, tail_RM = rows.topk_ids_RK >= 0, rows.tail_ids_RM >= 0
    states = {n: torch.from_numpy(random.normal(0, 1 + n, (num_tokens - 1, WIDTH))).bfloat16() for n in CAPTURE.layers}
    return Trace(
        ordinal=prompt.ordinal, prompt_id=prompt.prompt_id, domain=prompt.domain,
        finish_reason=("stop", "length")[prompt.ordinal % 2], token_ids_T=tokens_T, loss_mask_T=mask_T,
        logsumexp_R=rows.logsumexp_R.numpy(), tail_mass_R=rows.tail_mass_R.numpy(),
        next_logprob_R=rows.next_logprob_R.numpy(),
        topk_counts_R=head_RK.sum(1).int().numpy(), topk_ids_N=rows.topk_ids_RK[head_RK].numpy(),
        topk_logprobs_N=rows.topk_logprobs_RK[head_RK].numpy(), tail_counts_R=tail_RM.sum(1).int().numpy(),
        tail_ids_N=rows.tail_ids_RM[tail_RM].numpy(), tail_logprobs_N=rows.tail_logprobs_RM[tail_RM].numpy(),
        hidden={n: h.view(torch.int16).numpy().view(np.uint16) for n, h in states.items()})


def main() -> None:
    folder = Path(__file__).parent / sys.argv[1]
    folder.mkdir()
    dataset = folder / "dataset"
    root = LocalRoot(dataset)
    run = start(root)
    encoded = [encode_trace(trace_of(p), CAPTURE.hidden_codec) for p in PROMPTS[:3]]
    commit_shard(root, run, 0, encoded[:2], [])
    given_up = [QuarantinedPrompt(i, PROMPTS[i].prompt_id, "too_long", "it is too long") for i in (3, 4)]
    commit_shard(root, run, 1, encoded[2:], given_up[:1])
    commit_shard(root, run, 2, [], given_up[1:])
    finalize(root)
    expected = [{name: getattr(t, name) for name in type(t).__dataclass_fields__} for t in stored_traces(dataset)]
    (folder / "expected.json").write_bytes(msgspec.json.encode(expected, enc_hook=lambda array: array.tolist()) + b"\n")
    states_NH = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    codecs = {}
    for codec in get_args(HiddenCodec):
        blob = encode_hidden(states_NH, codec)
        codecs[codec] = {"blob": bytes(blob.data).hex(),
                         "scales": None if blob.scale_T is None else blob.scale_T.tolist(),
                         "states": decode_hidden(blob, codec, WIDTH, dtype=torch.float32).tolist()}
    (folder / "codecs.json").write_text(json.dumps(codecs) + "\n")


if __name__ == "__main__":
    main()
