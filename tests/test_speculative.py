"""Catches a sampler that changes what the target would write, and counts that say more was accepted than was.

The target is a real, tiny Llama with random weights and four tokens, so that every text of three can be enumerated.
Shapes: V tokens, K drafted tokens.
"""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_drafts import TableDraft, TableTarget, write_target

from distill_pipe.consume import DraftVocabulary
from distill_pipe.consume.drafts.checkpoint import DRAFTS, new_draft
from distill_pipe.consume.drafts.draft import Draft
from distill_pipe.consume.drafts.target_files import read_config
from distill_pipe.errors import UsageError
from distill_pipe.speculative.bench import BenchPrompt, BenchSettings, bench_prompts, count_accepted, stop_tokens
from distill_pipe.speculative.decode import Decoding, decode
from distill_pipe.speculative.prompts import DOMAINS, Prompt
from distill_pipe.speculative.sampler import draw, probabilities, verify
from distill_pipe.speculative.target import CachedTarget

VOCAB, LAYERS, PROMPT = 4, 3, (1, 2, 0)
KINDS = sorted(DRAFTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=LAYERS,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
                         tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(0, 0.4)
    path = tmp_path_factory.mktemp("target")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def target(folder: Path) -> CachedTarget:
    from transformers import LlamaForCausalLM

    return CachedTarget(LlamaForCausalLM.from_pretrained(folder).eval(), (1, 2, 3))


def make(kind: str, folder: Path, vocabulary: DraftVocabulary | None = None) -> Draft:
    torch.manual_seed(1)
    draft = new_draft(kind, read_config(folder), DRAFTS[kind].layers_read((1, 2, 3), LAYERS), 3, vocabulary, folder)
    with torch.no_grad():
        for weight in draft.parameters():
            if weight.requires_grad:
                weight += 0.2 * torch.randn_like(weight)
    return draft.eval()


def text_probabilities(target: CachedTarget, temperature: float) -> dict[tuple[int, ...], float]:
    """How likely the target itself writes each text of three tokens."""
    found = {}
    for text in itertools.product(range(VOCAB), repeat=3):
        target.reset()
        logits_TV, _ = target.extend([*PROMPT, *text])
        p_TV = probabilities(logits_TV[len(PROMPT) - 1:-1], temperature)
        found[text] = float(np.prod([p_TV[i, token].item() for i, token in enumerate(text)]))
    return found


def g_test(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """The G statistic in standard deviations of its chi-square; texts too rare to count are taken together."""
    total = sum(counts.values())
    rare = {text for text, p in expected.items() if p * total < 5}
    cells = [(counts[text], p * total) for text, p in expected.items() if text not in rare]
    cells.append((sum(counts[text] for text in rare), sum(expected[text] for text in rare) * total))
    g = 2 * sum(seen * np.log(seen / mean) for seen, mean in cells if seen)
    degrees = len(cells) - 1
    return float((g - degrees) / np.sqrt(2 * degrees))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_distributed_as_the_targets_own_text(kind, folder, target) -> None:
    draft = make(kind, folder, DraftVocabulary.from_ids([0, 1, 3], VOCAB) if kind == "eagle3" else None)
    generator, how = torch.Generator().manual_seed(0), Decoding(drafted=2, temperature=1.0, max_tokens=3)
    counts = Counter(decode(target, draft, PROMPT, how, generator).token_ids for _ in range(1500))
    assert g_test(counts, text_probabilities(target, 1.0)) < 4


def test_the_test_of_the_distribution_notices_a_sampler_that_accepts_too_much(target, folder) -> None:
    draft, generator = make("medusa", folder), torch.Generator().manual_seed(0)
    expected = text_probabilities(target, 1.0)
    how = Decoding(drafted=2, temperature=1.0, max_tokens=3)

    class Eager(CachedTarget):
        """Logits turned flat: everything is accepted, and the text is nearly the draft's."""

        def extend(self, token_ids):
            logits_TV, hidden = super().extend(token_ids)
            return logits_TV / 2, hidden

    eager = Eager(target._model, (1, 2, 3))
    assert g_test(Counter(decode(eager, draft, PROMPT, how, generator).token_ids for _ in range(600)), expected) > 10


def test_verification_keeps_the_distribution_of_each_token() -> None:
    generator = torch.Generator().manual_seed(3)
    p_3V, q_2V = (torch.randn(n, 6, generator=generator).double().mul(2).softmax(1) for n in (3, 2))
    first, second = torch.zeros(6), torch.zeros(6, 6)
    accepted = 0
    for _ in range(20_000):
        drafted = [draw(q_V, generator) for q_V in q_2V]
        held, token = verify(drafted, q_2V, p_3V, generator)
        text = [*drafted[:held], token]
        first[text[0]] += 1
        accepted += held > 0
        if len(text) > 1:
            second[text[0], text[1]] += 1
    noise = (p_3V[0] * (1 - p_3V[0]) / 20_000).sqrt()
    assert ((first / 20_000 - p_3V[0]).abs() < 5 * noise).all()
    assert accepted / 20_000 == pytest.approx(torch.minimum(p_3V[0], q_2V[0]).sum().item(), abs=0.02)
    # Behind an accepted token the second one is the target's too, whatever the first was.
    after = second.sum(0) / second.sum()
    assert ((after - p_3V[1]).abs() < 5 * (p_3V[1] * (1 - p_3V[1]) / second.sum()).sqrt()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_targets_greedy_text(kind, folder, target) -> None:
    how = Decoding(drafted=3, temperature=0.0, max_tokens=24)
    decoded = decode(target, make(kind, folder), PROMPT, how, torch.Generator().manual_seed(0))
    written = list(PROMPT)
    for _ in range(24):
        target.reset()
        written.append(int(target.extend(written)[0][-1].argmax()))
    assert list(decoded.token_ids) == written[len(PROMPT):]
    assert 24 <= 1 + sum(decoded.accepted) + len(decoded.accepted) < 24 + 4


def test_tokens_that_are_taken_back_leave_no_trace(target) -> None:
    target.reset()
    target.extend([1, 2])
    target.extend([3, 0, 1])
    target.take_back(2)
    again_TV, hidden = target.extend([2, 2])
    target.reset()
    whole_TV, whole = target.extend([1, 2, 3, 2, 2])
    assert torch.allclose(again_TV, whole_TV[-2:], atol=1e-5)
    for layer in (1, 2, 3):
        assert torch.allclose(hidden[layer], whole[layer][-2:], atol=1e-5)


@pytest.mark.parametrize("window", [2, 4])
def test_tokens_are_taken_back_from_layers_with_a_sliding_window_too(window: int) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    config = MistralConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=1, sliding_window=window)
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    sliding = CachedTarget(model, (1, 2))
    written, text = [1, 2, 3, 0, 2, 1], torch.randint(VOCAB, (20,)).tolist()
    sliding.extend(written)
    for token, wrong in itertools.pairwise(text):
        kept_TV, hidden = sliding.extend([token, wrong, wrong, 0])
        sliding.take_back(3)
        written.append(token)
        with torch.inference_mode():
            whole_TV = model(input_ids=torch.tensor([written]), use_cache=False).logits[0]
        assert torch.allclose(kept_TV[0], whole_TV[-1], atol=1e-4)
    sliding.reset()
    assert torch.allclose(sliding.extend(written)[1][2][-1], hidden[2][0], atol=1e-4)
    # What has left the window matters: the model is one with windows.
    with torch.inference_mode():
        cut_TV = model(input_ids=torch.tensor([[0, *written[1:]]]), use_cache=False).logits[0]
    assert torch.allclose(cut_TV[-1], whole_TV[-1], atol=1e-4)


def test_a_target_that_cannot_take_tokens_back_is_refused() -> None:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                             num_attention_heads=2, num_key_value_heads=1, head_dim=8, linear_num_key_heads=1,
                             linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2,
                             num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8,
                             layer_types=["linear_attention", "full_attention"])
    with pytest.raises(UsageError, match="Qwen3NextForCausalLM has layers of linear attention"):
        CachedTarget(Qwen3NextForCausalLM(config), (1,))


def test_a_step_that_runs_past_the_last_token_wanted_counts_as_a_whole(tmp_path: Path) -> None:
    copy = TableDraft(write_target(tmp_path))
    for max_tokens, steps in ((2, 1), (5, 1), (6, 2), (9, 2)):
        decoded = decode(TableTarget(), copy, [3, 1], Decoding(3, 1.0, max_tokens), torch.Generator().manual_seed(0))
        assert (len(decoded.token_ids), decoded.accepted) == (max_tokens, (3,) * steps)


def test_a_text_ends_at_a_stop_token_and_counts_nothing_behind_it(folder, target) -> None:
    generator = torch.Generator().manual_seed(0)
    for stop in range(VOCAB):
        how = Decoding(drafted=3, temperature=1.0, max_tokens=40, stop_ids=frozenset([stop]))
        decoded = decode(target, make("mtp", folder), PROMPT, how, generator)
        assert decoded.token_ids.index(stop) == len(decoded.token_ids) - 1
        assert sum(decoded.accepted) + len(decoded.accepted) in (len(decoded.token_ids) - 1, len(decoded.token_ids))


@pytest.mark.parametrize("kind", ["medusa", "mlp_speculator"])
def test_parallel_heads_cannot_draft_more_than_they_have(kind, folder, target) -> None:
    with pytest.raises(UsageError, match="trained for 3 positions"):
        decode(target, make(kind, folder), PROMPT, Decoding(4, 1.0, 8), torch.Generator())


def test_tau_is_counted_by_domain_temperature_and_length(folder, target) -> None:
    prompts = [BenchPrompt("code" if i % 2 else "maths", (1, i % VOCAB)) for i in range(6)]
    settings = BenchSettings(max_tokens=12, temperatures=(0.0, 1.0), drafted=(1, 5))
    found = count_accepted(target, make("eagle3", folder), prompts, settings, "tiny", frozenset())
    assert [(c.domain, c.temperature, c.drafted) for c in found.counts] == [
        (domain, t, k) for t in (0.0, 1.0) for k in (1, 5) for domain in (None, "maths", "code")]
    for whole, maths, code in zip(*[iter(found.counts)] * 3, strict=True):
        assert (whole.prompts, whole.steps, whole.accepted) == (6, maths.steps + code.steps,
                                                                maths.accepted + code.accepted)
        assert whole.low <= whole.tau == 1 + whole.accepted / whole.steps <= whole.high <= whole.drafted + 1
    assert found == count_accepted(target, make("eagle3", folder), prompts, settings, "tiny", frozenset())


@pytest.mark.parametrize("domain", sorted(DOMAINS))
def test_real_prompts_are_found_and_a_part_of_each_domain_is_held_out(domain: str) -> None:
    if domain == "maths":
        pytest.importorskip("reasoning_gym")
    taken = list(itertools.islice(DOMAINS[domain](), 150))
    assert {p.domain for p in taken} == {domain}
    assert len({p.id for p in taken}) == len(taken) == 150
    assert 10 < sum(p.held_out for p in taken) < 50


def test_a_question_that_was_asked_twice_is_on_one_side() -> None:
    for text in ("What is a lighthouse?", "Why is the sea salt?", "Count to ten.", "Name a colour.", "Who are you?"):
        assert len({Prompt(id=f"sharegpt/{i}", domain="general", text=text).held_out for i in range(40)}) == 1


def test_bench_prompts_are_held_out_rendered_by_the_targets_template_and_fit(tmp_path: Path) -> None:
    from distill_pipe.produce.targets import resolve_target

    smollm2 = resolve_target("smollm2-135m")
    corpus = tmp_path / "mine.jsonl"
    corpus.write_text('{"prompt": "Name a colour."}\n{"prompt": "And another."}\n')
    prompts = list(bench_prompts(smollm2, ["code", str(corpus)], 3, 64))
    assert [p.domain for p in prompts] == ["code"] * 3 + ["mine"] * 2
    assert all(p.token_ids[0] == prompts[0].token_ids[0] for p in prompts)
    assert stop_tokens(smollm2)
    with pytest.raises(UsageError, match="give general, code, maths"):
        list(bench_prompts(smollm2, ["poetry"], 1, 64))
