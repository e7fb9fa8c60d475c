"""Small datasets made without an engine: random but valid traces, committed through the store as `generate` would.

Shapes: T tokens, R supervised rows, V vocabulary, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from distill_pipe.consume.sparse import PADDING, SparseTarget
from distill_pipe.store.commit import commit_shard
from distill_pipe.store.hidden_codec import encode_trace
from distill_pipe.store.manifest import RUN, FileRef, Run, encode_record
from distill_pipe.store.plan import Message, PlannedPrompt, num_shards, shard_range, write_plan_part
from distill_pipe.store.root import open_root, sha256_of
from distill_pipe.store.spec import CaptureSpec, CorpusSpec, EngineSpec, HiddenCodec, RunSpec, SamplingSpec, TargetSpec
from distill_pipe.store.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a test dataset looks like. `layers` are canonical and at most `num_layers`."""

    vocab_size: int = 64
    hidden_size: int = 8
    num_layers: int = 4
    layers: tuple[int, ...] = (1, 2, 4)
    hidden_codec: HiddenCodec = "bf16-split"
    top_k: int = 8
    tail_samples: int = 4
    logprob_bits: int = 24
    prompts_per_shard: int = 4
    architecture: str = "LlamaForCausalLM"
    final_norm_eps: float | None = None


def start_run(root: Path | str, num_prompts: int, shape: Shape = Shape(), sampling: SamplingSpec | None = None) -> Run:
    """Freeze a run and its plan below `root`, a folder or an address; with `sampling`, the target wrote the texts."""
    store = open_root(root)
    spec = RunSpec(
        target=TargetSpec(name="tiny", revision="sha256:" + "0" * 64, architecture=shape.architecture, dtype="float32",
                          vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, num_layers=shape.num_layers,
                          final_norm_eps=shape.final_norm_eps, tokenizer_sha256="0" * 64),
        corpus=CorpusSpec(files=(), prompts=num_prompts),
        responses="corpus" if sampling is None else "target", sampling=sampling,
        capture=CaptureSpec(top_k=shape.top_k, tail_samples=shape.tail_samples, layers=shape.layers,
                            hidden_codec=shape.hidden_codec, logprob_bits=shape.logprob_bits),
        engine=EngineSpec(name="none", version="0", max_model_len=4096), prompts_per_shard=shape.prompts_per_shard)
    prompts = [PlannedPrompt(i, f"prompt-{i}", None, (Message("text", f"text {i}"),)) for i in range(num_prompts)]
    with store.scratch() as folder:
        path = folder / "plan"
        write_plan_part(path, [prompts[i:i + shape.prompts_per_shard]
                               for i in range(0, num_prompts, shape.prompts_per_shard)])
        plan = FileRef(name="plan/part-0000.parquet", sha256=sha256_of(path), size=path.stat().st_size)
        store.publish(path, plan.name)
    run = Run(fingerprint=spec.fingerprint, spec=spec, plan=(plan,), created_by="tests", created_at="2026-01-01")
    store.create_bytes(encode_record(run), RUN)
    return run


def commit_traces(root: Path | str, run: Run, traces: Sequence[Trace]) -> None:
    """Commit the traces of a whole run, shard by shard. They lose their hidden states on the way."""
    by_ordinal = {t.ordinal: t for t in traces}
    for shard in range(num_shards(run)):
        held = [encode_trace(by_ordinal[o], run.spec.capture.hidden_codec) for o in range(*shard_range(run, shard))]
        commit_shard(open_root(root), run, shard, held, [])


def make_dataset(root: Path | str, num_prompts: int = 10, shape: Shape = Shape(), seed: int = 0) -> Run:
    """A committed dataset of random traces; `random_trace(ordinal, shape, seed)` makes any of them again."""
    run = start_run(root, num_prompts, shape)
    commit_traces(root, run, [random_trace(i, shape, seed) for i in range(num_prompts)])
    return run


def random_trace(ordinal: int, shape: Shape = Shape(), seed: int = 0) -> Trace:
    """5 to 16 random tokens with a random loss mask, random logits and random hidden states."""
    random = np.random.default_rng([seed, ordinal])
    num_tokens = int(random.integers(5, 17))
    loss_mask_T = random.random(num_tokens) < 0.6
    loss_mask_T[0], loss_mask_T[-1] = False, True
    logits_TV = random.normal(0, 2, (num_tokens, shape.vocab_size)).astype(np.float32)
    hidden = {n: random.normal(0, 1, (num_tokens - 1, shape.hidden_size)).astype(np.float32) for n in shape.layers}
    tokens_T = random.integers(0, shape.vocab_size, num_tokens).astype(np.int32)
    return trace_from_logits(ordinal, tokens_T, loss_mask_T, logits_TV, hidden, shape)


def trace_from_logits(ordinal: int, token_ids_T: NDArray[np.int32], loss_mask_T: NDArray[np.bool_],
                      logits_TV: NDArray[np.float32], hidden: dict[int, NDArray[np.float32]], shape: Shape,
                      domain: str | None = None) -> Trace:
    """A trace whose row at position t is the distribution `logits_TV[t]`."""
    positions_R = np.flatnonzero(loss_mask_T[1:])
    logits_RV = torch.from_numpy(logits_TV)[positions_R]
    generator = torch.Generator().manual_seed(ordinal)
    target = SparseTarget.from_logits(logits_RV, shape.top_k, shape.tail_samples, generator)
    next_R1 = torch.from_numpy(token_ids_T.astype(np.int64))[positions_R + 1][:, None]
    head_RK, tail_RM = target.topk_ids_RK != PADDING, target.tail_ids_RM != PADDING
    return Trace(
        ordinal=ordinal, prompt_id=f"prompt-{ordinal}", domain=domain, finish_reason="given", token_ids_T=token_ids_T,
        loss_mask_T=loss_mask_T, logsumexp_R=logits_RV.logsumexp(1).numpy(), tail_mass_R=target.tail_mass_R.numpy(),
        next_logprob_R=logits_RV.log_softmax(1).gather(1, next_R1)[:, 0].numpy(),
        topk_counts_R=head_RK.sum(1).int().numpy(), topk_ids_N=target.topk_ids_RK[head_RK].int().numpy(),
        topk_logprobs_N=target.topk_logprobs_RK[head_RK].numpy(), tail_counts_R=tail_RM.sum(1).int().numpy(),
        tail_ids_N=target.tail_ids_RM[tail_RM].int().numpy(), tail_logprobs_N=target.tail_logprobs_RM[tail_RM].numpy(),
        hidden=dict(hidden))
