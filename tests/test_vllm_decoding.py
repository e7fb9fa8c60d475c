"""Catches a checkpoint that vLLM does not load, or runs as another draft than the one that was trained: its own
speculative decoding must write the target's greedy text and accept what our sampler accepts."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from distill_pipe.consume.drafts.checkpoint import DRAFTS, load_draft, new_draft, save_draft
from distill_pipe.consume.drafts.target_files import read_config
from distill_pipe.consume.vocabulary import DraftVocabulary
from distill_pipe.errors import UsageError
from distill_pipe.produce.replay import load_model
from distill_pipe.produce.targets import resolve_target
from distill_pipe.speculative.bench import DraftBench, bench_prompts, stop_tokens
from distill_pipe.speculative.decode import Decoding, decode
from distill_pipe.speculative.target import CachedTarget
from distill_pipe.speculative.vllm_decoding import decode_with_vllm

LAYERS, DRAFTED, PROMPTS, TOKENS = (2, 15, 27, 30), 3, 3, 24
def write_draft(kind: str, folder: Path, vocabulary: DraftVocabulary | None) -> None:
    target = resolve_target("smollm2-135m")
    torch.manual_seed(0)
    layers = DRAFTS[kind].layers_read(LAYERS, target.spec.num_layers)
    draft = new_draft(kind, read_config(target.folder), layers, DRAFTED, vocabulary, target.folder)
    with torch.no_grad():
        for name, weight in draft.named_parameters():
            # Enough to tell weights apart, and not so much that nothing is accepted.
            if weight.requires_grad and "head" not in name:
                weight += 0.02 * weight.std() * torch.randn_like(weight)
    save_draft(draft, folder, target="smollm2-135m", holdout_every=10)


@pytest.mark.drafts
@pytest.mark.parametrize(("kind", "size"), [("eagle3", None), ("eagle3", 8192), ("medusa", None), ("mtp", None)])
def test_vllm_writes_the_greedy_text_and_accepts_what_our_sampler_accepts(kind, size, tmp_path) -> None:
    vocabulary = None if size is None else DraftVocabulary.from_ids(torch.arange(size), 49152)
    write_draft(kind, tmp_path, vocabulary)
    # One engine per process: vLLM keeps counters and groups of its own.
    line = ("bench-draft", "--draft", tmp_path, "--corpus", "code", "--prompts", PROMPTS, "--max-tokens", TOKENS,
            "--temperature", 0, "--k", DRAFTED, "--vllm", "--json")
    done = subprocess.run([sys.executable, "-m", "distill_pipe.cli", *map(str, line)], capture_output=True, text=True,
                          timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    found = msgspec.json.decode(done.stdout, type=DraftBench)
    ours = found.counts[0]
    assert ours.accepted > 0
    # vLLM drafts once less at the end of a text, where no more tokens are wanted.
    assert found.vllm.tau == pytest.approx(ours.tau, abs=0.1)
    assert list(found.vllm.texts) == greedy_texts(tmp_path)


def greedy_texts(folder: Path) -> list[tuple[int, ...]]:
    target = resolve_target("smollm2-135m")
    draft = load_draft(folder, target.folder)
    model = CachedTarget(load_model(target, "float32"), draft.layers)
    how = Decoding(DRAFTED, 0.0, TOKENS, stop_tokens(target))
    return [decode(model, draft, prompt.token_ids, how, torch.Generator()).token_ids
            for prompt in bench_prompts(target, ["code"], PROMPTS, TOKENS)]


def test_a_draft_that_vllm_has_no_class_for_is_refused(tmp_path) -> None:
    write_draft("mlp_speculator", tmp_path, DraftVocabulary.from_ids(torch.arange(64), 49152))
    with pytest.raises(UsageError, match="does not register"):
        decode_with_vllm(resolve_target("smollm2-135m"), tmp_path, [], 3, 8)
