"""Datasets for the tests of exports: tiny, with a final norm, and a target folder that fits them.

Shapes: T tokens, V vocabulary, H hidden size.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_datasets import Shape, commit_traces, make_dataset, random_trace, start_run, trace_from_logits

from distill_pipe.store.manifest import Run
from distill_pipe.store.norm import write_final_norm
from distill_pipe.store.root import open_root
from distill_pipe.store.trace import Trace

EPS = 1e-5
SHAPE = Shape(num_layers=4, layers=(1, 2, 3, 4), final_norm_eps=EPS)
PROMPTS = 10
# Short enough that some traces are cut by trainers of fixed lengths.
SEQ = 12


def norm_weight(shape: Shape = SHAPE) -> np.ndarray:
    return np.random.default_rng(7).uniform(0.5, 2, shape.hidden_size).astype(np.float32)


def normed_dataset(root: Path | str, shape: Shape = SHAPE, num_prompts: int = PROMPTS, seed: int = 0
                   ) -> Run:
    """`make_dataset` with a final norm: `random_trace(ordinal, shape, seed)` makes any of its traces again."""
    run = make_dataset(root, num_prompts, shape, seed)
    write_final_norm(open_root(root), norm_weight(shape))
    return run


def certain_dataset(root: Path, shape: Shape = SHAPE, num_prompts: int = 4) -> Run:
    """A target that is nearly certain of the token that follows, so that a row in a wrong place shows."""
    run = start_run(root, num_prompts, shape)
    commit_traces(root, run, [certain_trace(i, shape) for i in range(num_prompts)])
    write_final_norm(open_root(root), norm_weight(shape))
    return run


def certain_trace(ordinal: int, shape: Shape = SHAPE) -> Trace:
    trace = random_trace(ordinal, shape)
    logits_TV = np.random.default_rng(ordinal).normal(0, 1, (trace.num_tokens, shape.vocab_size)).astype(np.float32)
    logits_TV[np.arange(trace.num_tokens - 1), trace.token_ids_T[1:]] = 12
    return trace_from_logits(ordinal, trace.token_ids_T, trace.loss_mask_T, logits_TV, trace.hidden, shape)


def target_weights(folder: Path, shape: Shape = SHAPE) -> dict[str, torch.Tensor]:
    """A target's folder with an embedding, a head and a config; returns its weights."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape.vocab_size, shape.hidden_size, generator=generator)
               for name in ("model.embed_tokens.weight", "lm_head.weight")}
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    return weights


def states(trace: Trace, layer: int) -> torch.Tensor:
    """The states of a layer, `[T-1, H]`, as a `bf16-split` dataset holds them."""
    return torch.from_numpy(trace.hidden[layer]).bfloat16()


def aux(trace: Trace, layers: tuple[int, ...]) -> torch.Tensor:
    """The states of some layers side by side."""
    return torch.cat([states(trace, n) for n in layers], 1)


def behind_norm(trace: Trace, layer: int, shape: Shape = SHAPE) -> torch.Tensor:
    """The last state behind the final norm, in float64 and rounded once."""
    x_TH = states(trace, layer).double()
    weight_H = torch.from_numpy(norm_weight(shape)).double()
    return (x_TH / (x_TH.square().mean(1, keepdim=True) + EPS).sqrt() * weight_H).bfloat16()


def assert_rounds_to(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the last bit of bfloat16, since one side was computed in float32 and the other in float64."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-7, atol=0)


def traces() -> list[Trace]:
    """What `normed_dataset` holds."""
    return [random_trace(i, SHAPE) for i in range(PROMPTS)]


def pickled(folder: Path, pattern: str) -> list[dict[str, torch.Tensor]]:
    files = sorted(folder.rglob(pattern), key=lambda p: int(p.stem.rpartition("_")[2]))
    return [torch.load(f, weights_only=True) for f in files]


def head_of_row(trace: Trace, row: int) -> tuple[list[int], np.ndarray]:
    ends = trace.topk_counts_R.cumsum()
    span = slice(ends[row] - trace.topk_counts_R[row], ends[row])
    return trace.topk_ids_N[span].tolist(), trace.topk_logprobs_N[span]
