"""The same rows out of every layout of the engine: however a prompt is cut, preempted, cached or spread over devices.

Catches a vocabulary part with wrong offsets or padding, states of an earlier pipeline stage that are lost or shifted,
rows that a prefix-cache hit leaves out, and rows captured twice after a preemption. The engine is real and in float32;
rows of two layouts may differ by rounding alone.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from byte_target import make_byte_target
from runs import LAYERS, PROMPTS, command, prompt_records, stored_traces, succeed, write_corpus
from tiny_targets import write_qwen3_moe

from distill_pipe.store.spec import Responses
from distill_pipe.store.trace import Trace

pytestmark = pytest.mark.engine

LOGPROB, RELATIVE = 2e-4, 2e-5
EXACT = ("--hidden-codec", "f32", "--set", "capture.logprob_bits=24", "--set", "dtype=float32")
# Long enough to be cut at 64 and at 200 tokens, and the same up to their ends, which is what a prefix cache shares.
STORY = ("The keeper of the lighthouse counted the ships that passed, wrote each name into a book with a blue cover, "
         "and lit the lamp when the sun went down behind the hills. ") * 5
ANSWERS = [{"messages": [{"role": "user", "content": STORY + f"What happened on day {i}?"},
                         {"role": "assistant", "content": f"On day {i} the sea was calm. " + STORY[:60 * i]}]}
           for i in range(1, 6)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("layouts") / "answers.jsonl", ANSWERS)


def captured(folder: Path, target: object, corpus: Path, layers: tuple[int, ...], *settings: str,
             responses: Responses = "corpus") -> list[Trace]:
    options = [part for setting in settings for part in ("--set", setting)]
    succeed("generate", "--target", target, "--corpus", corpus, "--out", folder, "--responses", responses, "--layers",
            ",".join(map(str, layers)), *EXACT, *options)
    return list(stored_traces(folder))


def by_token(trace: Trace) -> Iterator[dict[int, float]]:
    """The head of each row."""
    rows = np.split(np.arange(len(trace.topk_ids_N)), np.cumsum(trace.topk_counts_R)[:-1])
    for row in rows:
        yield dict(zip(trace.topk_ids_N[row].tolist(), trace.topk_logprobs_N[row].tolist(), strict=True))


def assert_same_rows(found: list[Trace], wanted: list[Trace]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.token_ids_T.tolist() == b.token_ids_T.tolist()
        assert a.loss_mask_T.tolist() == b.loss_mask_T.tolist()
        for name in ("logsumexp_R", "tail_mass_R", "next_logprob_R"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=LOGPROB, rtol=0, err_msg=name)
        for ours, theirs in zip(by_token(a), by_token(b), strict=True):
            shared = ours.keys() & theirs.keys()
            assert max(abs(ours[token] - theirs[token]) for token in shared) <= LOGPROB
            # Only tokens as likely as the last of the head may be in one and not in the other.
            last = max(min(ours.values()), min(theirs.values()))
            assert all({**ours, **theirs}[token] <= last + LOGPROB for token in ours.keys() ^ theirs.keys())
        assert (a.tail_ids_N == b.tail_ids_N).mean() >= 0.99
        assert set(a.hidden) == set(b.hidden)
        for layer, states in b.hidden.items():
            assert np.linalg.norm(a.hidden[layer] - states) <= RELATIVE * np.linalg.norm(states), f"layer {layer}"


@pytest.fixture(scope="module")
def one_shot(answers: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    return captured(tmp_path_factory.mktemp("one-shot") / "out", "smollm2-135m", answers, LAYERS)


@pytest.mark.parametrize("tokens", [64, 200])
def test_prompts_cut_into_chunks_give_the_same_rows(tmp_path, answers, one_shot, tokens: int) -> None:
    found = captured(tmp_path / "out", "smollm2-135m", answers, LAYERS, f"engine.max_num_batched_tokens={tokens}",
                     "engine.max_num_seqs=8")
    assert max(trace.num_tokens for trace in found) > tokens
    assert_same_rows(found, one_shot)


def test_a_prefix_cache_takes_no_row_away(tmp_path, answers, one_shot) -> None:
    found = captured(tmp_path / "out", "smollm2-135m", answers, LAYERS, "engine.enable_prefix_caching=true",
                     "engine.max_num_seqs=1")
    assert_same_rows(found, one_shot)


def test_two_pipeline_stages_give_the_same_rows(tmp_path, answers, one_shot) -> None:
    found = captured(tmp_path / "out", "smollm2-135m", answers, LAYERS, "engine.pipeline_parallel_size=2")
    assert_same_rows(found, one_shot)


def test_preempted_requests_give_the_same_rows(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", prompt_records())
    greedy = ("sampling.temperature=0", "sampling.max_tokens=100", "max_model_len=256")
    wanted = captured(tmp_path / "wanted", "smollm2-135m", corpus, LAYERS, *greedy, responses="target")
    # 30 layers, 3 heads of 64 float32 keys and values: 46,080 bytes a token. Room for 480 tokens, and 6 requests of up
    # to 150.
    cramped = f"engine.kv_cache_memory_bytes={46_080 * 480}"
    found = captured(tmp_path / "found", "smollm2-135m", corpus, LAYERS, *greedy, cramped, responses="target")
    assert sum(trace.num_tokens for trace in found) > 480
    assert len(found) == len(PROMPTS)
    assert_same_rows(found, wanted)


@pytest.mark.layouts
@pytest.mark.parametrize(("make", "responses"), [(make_byte_target, "target"), (write_qwen3_moe, "corpus")])
def test_a_vocabulary_over_two_devices_gives_the_same_rows(tmp_path: Path, make: Callable[[Path], Path],
                                                           responses: Responses) -> None:
    # The first target's 259 tokens do not divide by two: the second device's part ends in padding. The other one's
    # experts are split as well.
    target = make(tmp_path / "target")
    corpus = write_corpus(tmp_path / "c.jsonl", [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": p[::-1]}][:1 + (
            responses == "corpus")]} for p in PROMPTS])
    settings = ("sampling.max_tokens=20", "max_model_len=200")
    wanted = captured(tmp_path / "wanted", target, corpus, (0, 2, 4), *settings, responses=responses)
    found = captured(tmp_path / "found", target, corpus, (0, 2, 4), *settings, "engine.tensor_parallel_size=2",
                     responses=responses)
    assert_same_rows(found, wanted)


def test_a_model_that_cannot_relay_states_between_stages_is_refused_with_the_reason(tmp_path, answers) -> None:
    target = write_qwen3_moe(tmp_path / "target")
    done = command("generate", "--target", target, "--corpus", answers, "--out", tmp_path / "out", "--responses",
                   "corpus", "--layers", "0,2", "--set", "engine.pipeline_parallel_size=2")
    assert done.returncode == 7
    assert done.stderr.splitlines()[-1].startswith(
        "error: vLLM's Qwen3MoeForCausalLM does not pass hidden states on between pipeline stages; set ")
    assert not list((tmp_path / "out").glob("data/**/*.parquet"))


@pytest.mark.parametrize(("setting", "reason"), [
    ("engine.tensor_parallel_size=7", "must be divisible by tensor parallel size"),
    ("engine.kv_cache_memory_bytes=1000", "vLLM cannot run"),
    ("engine.enable_expert_parallel=true", "expert parallelism needs GPUs"),
])
def test_a_layout_that_the_engine_cannot_have_is_one_line(tmp_path, answers, setting: str, reason: str) -> None:
    done = command("generate", "--target", "smollm2-135m", "--corpus", answers, "--out", tmp_path / "out",
                   "--responses", "corpus", "--set", setting)
    assert done.returncode == 7
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
