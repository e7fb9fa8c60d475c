"""Every preset through the whole pipeline on its tiny twin: generate, verify, one step of training.

Catches a class that the engine cannot start, states that its preset promises and it does not deliver, a chat template
of its kind that breaks a run, and a dataset of it that no draft can be trained on.
"""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from runs import PROMPTS, command, prompt_records, stored_traces, write_corpus
from tiny_twins import LAYERS, VOCAB, write_twin

from distill_pipe.consume.losses import lk_hybrid_loss
from distill_pipe.consume.reader import ShardReader
from distill_pipe.produce.chat import Renderer
from distill_pipe.produce.preset import FOLDER_VARIABLE, load_preset, preset_names
from distill_pipe.produce.targets import resolve_target
from distill_pipe.store.plan import Message

TWINS = [name for name in preset_names() if (found := load_preset(name)) and found.config is not None]
# So many that one is held out from training.
NUMBERS = tuple(f"Count from {i} to {i + 9}." for i in range(24))
RECORDS = [*prompt_records((*PROMPTS, *NUMBERS)), {"id": "turns", "messages": [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue.", "reasoning_content": "The sea is."},
    {"role": "user", "content": "Why?"}]}]


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-8b", "kimi-k2", "deepseek-r1"])
def test_a_twin_stands_in_for_its_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = load_preset(name)
    assert real is not None
    folder = write_twin(name, tmp_path)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    target = resolve_target(name)
    assert (target.folder, target.spec.name, target.spec.num_layers) == (folder, name, LAYERS)
    assert target.spec.architecture == (real.config and real.config.architectures[0])
    assert (target.limits, target.default_layers) == (real.limits, (2, LAYERS))
    renderer = Renderer(folder)
    text = "naïve 日本 🙂 def f(x):\n    return x"
    assert renderer.tokenizer.decode(renderer.tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    rendered = renderer.render([Message("user", "a"), Message("assistant", "b", reasoning_content="c")], "corpus")
    said = [token for token, mask in zip(rendered.token_ids_T, rendered.loss_mask_T, strict=True) if mask]
    assert renderer.tokenizer.decode(said) == "<think>\nc\n</think>\n\nb<|im_end|>"
    whole = renderer.tokenizer.decode(rendered.token_ids_T)
    assert (datetime.now(UTC).strftime("%Y") in whole) == name.startswith("llama")


@pytest.mark.engine
@pytest.mark.targets
@pytest.mark.parametrize("name", TWINS)
def test_a_twin_goes_through_generate_verify_and_a_step_of_training(tmp_path: Path, name: str) -> None:
    write_twin(name, tmp_path)
    env = {FOLDER_VARIABLE: str(tmp_path)}
    corpus, out = write_corpus(tmp_path / "c.jsonl", RECORDS), tmp_path / "out"
    lines = [("generate", "--target", name, "--corpus", corpus, "--out", out, "--hidden-codec", "q8", "--set",
              "prompts_per_shard=8", "--set", "engine.max_num_seqs=16"), ("verify", out)]
    layers = resolve_layers_of(name)
    if layers:
        lines.append(("train", out, "--arch", "eagle3", "--steps", 1, "--positions", 2, "--target", tmp_path / name,
                      "--json"))
    for line in lines:
        done = command(*line, env=env)
        assert done.returncode == 0, done.stderr
    traces = list(stored_traces(out))
    assert len(traces) == len(RECORDS)
    assert all(tuple(trace.hidden) == layers for trace in traces)
    if layers:
        assert json.loads(done.stdout)["steps"] == 1
    else:
        a_step_on_the_head_alone(out)


def resolve_layers_of(name: str) -> tuple[int, ...]:
    found = load_preset(name)
    return () if found is None or not found.limits.states else (2, LAYERS)


def a_step_on_the_head_alone(out: Path) -> None:
    """Where no states are stored, a draft of its own still learns the distribution."""
    batch = next(iter(ShardReader(out, layers=(), batch_tokens=512, seed=0)))
    rows = batch.target.topk_ids_RK.shape[0]
    logits_RV = torch.zeros(rows, VOCAB, requires_grad=True)
    first = lk_hybrid_loss(logits_RV, batch.target)
    first.loss.backward()
    assert logits_RV.grad is not None
    with torch.no_grad():
        stepped_RV = logits_RV - 100.0 * logits_RV.grad
    assert lk_hybrid_loss(stepped_RV, batch.target).alpha > first.alpha
