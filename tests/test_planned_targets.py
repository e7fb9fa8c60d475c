"""Plans of targets that are nowhere near: no weights, no tokenizer, no GPU, no network, no vLLM.

Catches a plan that needs one of them or waits for torch to be imported, hours that do not follow from the named
assumptions, and a job that cannot fit and is let through.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace
from runs import LONG_PROMPT, PROMPTS, prompt_records, write_corpus
from test_forecast import run_spec
from test_presets import PUBLISHED

from distill_pipe.errors import UsageError
from distill_pipe.produce.characters import CharacterRenderer
from distill_pipe.produce.chat import Renderer, TooLongError
from distill_pipe.produce.forecast import forecast
from distill_pipe.produce.gpus import GPUS
from distill_pipe.produce.job import load_job
from distill_pipe.produce.memory import Device, Memory
from distill_pipe.produce.preset import load_preset
from distill_pipe.produce.sample import Totals
from distill_pipe.produce.smollm2 import materialise_smollm2
from distill_pipe.produce.targets import planned_target, preset_target
from distill_pipe.produce.throughput import BANDWIDTH_SHARE, FLOPS_SHARE, Work, estimate
from distill_pipe.store.plan import Message

GOLDEN = str(Path(__file__).parent / "golden" / "v1" / "dataset")
OPTIONS = ("--layers", "3+last", "--hidden-codec", "q6")


def plan(corpus: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """`distill-pipe plan` where neither the engine nor torch nor the hub can be had."""
    code = ("import sys; sys.modules.update(dict.fromkeys(('vllm', 'ray', 'transformers', 'torch')))\n"
            "from distill_pipe.cli import main; main()")
    return subprocess.run([sys.executable, "-c", code, "plan", "--corpus", str(corpus), *map(str, options)],
                          capture_output=True, text=True, timeout=300, env=without_hub(corpus))


def without_hub(corpus: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(corpus.parent / "hub")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("planned") / "c.jsonl", prompt_records())


def test_a_plan_of_a_685b_target_needs_nothing_of_it(corpus: Path) -> None:
    done = plan(corpus, "--target", "deepseek-v3", "--gpus", "8xH200", *OPTIONS, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["layers"] == [2, 30, 58, 61]
    assert found["layout"] == "1 x (tensor parallel 8, expert parallel) on 8xH200"
    assert found["fingerprint"] is None
    assert found["rows"] == 700 * len(PROMPTS)
    assert found["tokens"] > found["rows"]
    # Four states of 7168 numbers in q6, a third of bf16, dominate.
    assert found["bytes_per_token"] == pytest.approx(4 * 7168 * 2 / 3, rel=0.1)
    assert 0 < found["throughput"]["hours"] < 1
    notes = " ".join(found["notes"])
    for part in ("the preset's", "4 bytes of text", "50% of its memory bandwidth", "responses are assumed to have 700"):
        assert part in notes


@pytest.mark.parametrize("line", [
    ("--help",), ("generate", "--help"), ("targets", "list"), ("targets", "show", "deepseek-v3"), ("status", GOLDEN),
    ("plan", "--target", "deepseek-v3", "--gpus", "8xH200", "--corpus", "CORPUS", "--json")], ids=" ".join)
def test_a_command_that_only_looks_imports_no_torch_and_no_engine(corpus: Path, line: tuple[str, ...]) -> None:
    code = ("import sys\nfrom distill_pipe.cli import app\napp(sys.argv[1:], standalone_mode=False)\n"
            "print('imported', *{'torch', 'vllm', 'ray', 'transformers'} & sys.modules.keys())")
    done = subprocess.run([sys.executable, "-c", code, *(str(corpus) if word == "CORPUS" else word for word in line)],
                          capture_output=True, text=True, timeout=300, env=without_hub(corpus))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported"


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_preset_is_planned_on_every_type_of_gpu(corpus: Path, monkeypatch: pytest.MonkeyPatch, name: str,
                                                     gpu: str) -> None:
    monkeypatch.setattr("distill_pipe.produce.targets._reachable", lambda *_: False)
    preset = load_preset(name)
    assert preset is not None
    given = {"target": name, "corpus": str(corpus), "gpus": f"{2 * preset.layouts[gpu].devices}x{gpu}"}
    found = forecast(load_job(None, ["prompts_per_shard=3"], given, needs_out=False))
    assert found.layout.startswith("2 x (")
    assert found.memory.weights + found.memory.kv_least < found.memory.devices_per_engine * GPUS[gpu].bytes
    assert bool(found.layers) == preset.limits.states
    assert found.throughput is not None


def test_gpus_that_cannot_hold_the_target_are_refused_with_the_numbers(corpus: Path) -> None:
    done = plan(corpus, "--target", "deepseek-v3", "--gpus", "4xA100-80", *OPTIONS)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("error: deepseek-v3 does not fit 4xA100-80: 626.8 GiB of fp8 weights are 156.7 GiB on each, "
                           "which has 80.0; it takes 16xA100-80: tensor parallel 16, expert parallel, on 2 machines\n")


def test_a_layout_of_ones_own_that_cannot_hold_the_target_is_refused_with_the_numbers(corpus: Path) -> None:
    done = plan(corpus, "--target", "llama-3.3-70b", "--gpus", "1xH200", "--set", "engine.tensor_parallel_size=1")
    assert done.returncode == 2
    for part in ("131.41 GiB of bfloat16 weights", "of 92% of 140.40 GiB (H200)", "8192 tokens needs 2.50 GiB of KV"):
        assert part in done.stderr


def test_idle_gpus_are_said(corpus: Path) -> None:
    done = plan(corpus, "--target", "qwen3-235b", "--gpus", "6xH200", "--json")
    assert json.loads(done.stdout)["layout"].endswith("on 6xH200; 2 stay idle")


def test_a_target_whose_files_are_here_is_planned_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_pipe.produce.targets._reachable", lambda *_: False)
    target = planned_target("smollm2-135m")
    assert target.files == materialise_smollm2()
    assert planned_target("llama-3.1-8b").files is None
    with pytest.raises(UsageError, match="unknown target"):
        planned_target("no-such-target")
    assert preset_target("no-such-target") is None


def test_the_preset_and_the_files_of_a_target_agree() -> None:
    by_files, by_preset = planned_target("smollm2-135m"), preset_target("smollm2-135m")
    assert by_preset is not None
    for fact in ("vocab_size", "hidden_size", "num_layers", "architecture", "dtype"):
        assert getattr(by_files.spec, fact) == getattr(by_preset.spec, fact)
    assert by_files.default_layers == by_preset.default_layers


def conversations() -> list[list[Message]]:
    given = [[Message("user", text)] for text in (*PROMPTS, LONG_PROMPT)]
    return [*given, [Message("user", PROMPTS[2]), Message("assistant", LONG_PROMPT), Message("user", "Thanks!"),
                     Message("assistant", "You are welcome; ask me anything else.")]]


def counts(renderer: Renderer | CharacterRenderer, messages: Sequence[Message]) -> tuple[int, int]:
    spec = replace(run_spec(max_model_len=4096), responses="corpus" if messages[-1].role == "assistant" else "target")
    rendered = renderer.render_fitting(messages, spec)
    return len(rendered.token_ids_T), sum(rendered.loss_mask_T)


def test_characters_count_tokens_to_a_quarter() -> None:
    real = Renderer(materialise_smollm2())
    # The package's template puts a system prompt of 26 tokens before conversations that have none.
    wanted = [(length - 26, rows) for length, rows in (counts(real, messages) for messages in conversations())]
    found = [counts(CharacterRenderer(), messages) for messages in conversations()]
    for i in (0, 1):
        assert sum(pair[i] for pair in found) == pytest.approx(sum(pair[i] for pair in wanted), rel=0.25)


def test_characters_that_do_not_fit_are_refused_as_tokens_are() -> None:
    with pytest.raises(TooLongError, match=r"about .* tokens do not fit the context length of 24"):
        CharacterRenderer().render_fitting([Message("user", LONG_PROMPT)], run_spec(max_model_len=24))


MEMORY = Memory(engines=2, devices_per_engine=4, dtype="bfloat16", quantization=None, weights=10**11, weights_from="",
                kv_per_token=10**5, kv_batch=0, kv_least=0, logits=0, states=0, host=0, device=Device(kind="gpu"),
                fitting_sequences=32, assumptions=())


def test_hours_follow_from_the_assumptions_by_hand() -> None:
    totals, gpu = Totals(shards=4, trace=1000.0, token=500_000.0, row=300_000.0, fresh=0.0), GPUS["H200"]
    found = estimate(Work(totals, "target", 64), MEMORY, 10**10, gpu)
    prefill = FLOPS_SHARE * 989e12 * 4 / 2e10
    step = (10**11 + 32 * 10**5 * 500) / (BANDWIDTH_SHARE * 4.8e12 * 4) + 32 / prefill
    assert found.batch == 32, "no more than fit the cache"
    assert found.prefill_tokens_per_second == pytest.approx(prefill)
    assert found.decode_tokens_per_second == pytest.approx(32 / step)
    assert found.hours == pytest.approx((200_000 / prefill + 300_000 * step / 32) / 2 / 3600)
    scored = estimate(Work(totals, "corpus", 64), MEMORY, 10**10, gpu)
    assert scored.hours == pytest.approx(500_000 / prefill / 2 / 3600)
