"""Catches a loss mask that covers anything but the assistant's words, and templates that make that impossible."""

import json
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distill_pipe.errors import UsageError
from distill_pipe.produce.chat import RenderedPrompt, Renderer, load_tokenizer
from distill_pipe.produce.engines import start_renderer
from distill_pipe.produce.loss_mask import TemplateError
from distill_pipe.store.manifest import Run
from distill_pipe.store.plan import Message
from distill_pipe.store.spec import CaptureSpec, CorpusSpec, EngineSpec, RunSpec, TargetSpec

CLOSE = "<|im_end|>"
SPECIAL = ["<|endoftext|>", "<|im_start|>", CLOSE]
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
FORGETS = ("{% for m in messages %}{% if m.role != 'assistant' or loop.last %}<|im_start|>{{ m.role }}\n{{ m.content }}"
           "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
REFUSES = "{{ raise_exception('roles must alternate') }}"
BROKEN = "{% for m in messages %}"
UNDEFINED = "{{ messages[0].nothing.at_all }}"
SENTENCES = ["The quick brown fox jumps over the lazy dog.", "What is 2 + 2? It is 4.", "def f(x):\n    return x",
             "system user assistant", "Hello, how are you today?"]


def save_tokenizer(folder: Path, template: str | None, start_token: bool = False) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if start_token:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=CLOSE, bos_token="<|endoftext|>",  # noqa: S106
                                   additional_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(save_tokenizer(tmp_path_factory.mktemp("chatml"), CHATML))


def talk(*texts: str) -> list[Message]:
    """A conversation of alternating user and assistant."""
    return [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]


def decode(renderer: Renderer, ids: list[int]) -> str:
    return str(renderer.tokenizer.decode(ids, skip_special_tokens=False))


def spoken(renderer: Renderer, rendered: RenderedPrompt) -> str:
    """The text of the masked tokens."""
    assert len(rendered.token_ids_T) == len(rendered.loss_mask_T)
    pairs = zip(rendered.token_ids_T, rendered.loss_mask_T, strict=True)
    return decode(renderer, [token for token, mask in pairs if mask])


characters = st.characters(exclude_categories=["Cs"])
texts = st.text(characters, max_size=30).filter(lambda text: not any(token in text for token in SPECIAL))


@settings(max_examples=150)
@given(st.lists(texts, min_size=2, max_size=8).map(lambda t: t[:len(t) // 2 * 2]), st.none() | texts)
def test_the_masked_tokens_are_the_assistants_words_and_their_closing_token(chatml: Renderer, turns: list[str],
                                                                            system: str | None) -> None:
    messages = ([] if system is None else [Message("system", system)]) + talk(*turns)
    rendered = chatml.render(messages, "corpus")
    assert spoken(chatml, rendered) == "".join(text + CLOSE for text in turns[1::2])
    whole = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages)
    assert decode(chatml, rendered.token_ids_T) == whole.removesuffix("\n")
    assert rendered.loss_mask_T[-1]
    assert not rendered.loss_mask_T[0]


@settings(max_examples=50)
@given(st.lists(texts, min_size=1, max_size=5).filter(lambda t: len(t) % 2 == 1))
def test_a_prompt_for_the_target_ends_where_the_assistant_begins_and_has_no_mask(chatml: Renderer,
                                                                                 turns: list[str]) -> None:
    rendered = chatml.render(talk(*turns), "target")
    whole = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in talk(*turns))
    assert decode(chatml, rendered.token_ids_T) == whole + "<|im_start|>assistant\n"
    assert not any(rendered.loss_mask_T)


def test_a_given_response_is_tokenised_as_serving_would_prompt_first(chatml: Renderer) -> None:
    messages = talk("What is 2 + 2?", "It is 4.")
    given_ids = chatml.render(messages, "corpus").token_ids_T
    prompt_ids = chatml.render(messages[:1], "target").token_ids_T
    assert given_ids[:len(prompt_ids)] == prompt_ids


def test_turns_of_the_assistant_in_a_row_are_all_masked(chatml: Renderer) -> None:
    messages = [Message("user", "Hi"), Message("assistant", "One"), Message("assistant", "Two"), Message("user", "Hm")]
    rendered = chatml.render(messages, "corpus")
    assert spoken(chatml, rendered) == f"One{CLOSE}Two{CLOSE}"
    assert "Hm" not in decode(chatml, rendered.token_ids_T), "what follows the last response supervises nothing"


def test_the_special_tokens_are_single_tokens(chatml: Renderer) -> None:
    rendered = chatml.render(talk("a", "b"), "corpus")
    assert rendered.token_ids_T[-1] == chatml.tokenizer.convert_tokens_to_ids(CLOSE)
    assert rendered.token_ids_T.count(rendered.token_ids_T[-1]) == 2


def test_turns_that_the_template_rewrites_later_are_context(tmp_path: Path) -> None:
    renderer = Renderer(save_tokenizer(tmp_path, FORGETS))
    assert spoken(renderer, renderer.render(talk("a", "b"), "corpus")) == f"b{CLOSE}"
    rendered = renderer.render(talk("a", "b", "c", "d"), "corpus")
    assert spoken(renderer, rendered) == f"d{CLOSE}"
    assert "b" not in decode(renderer, rendered.token_ids_T)


@pytest.mark.parametrize("words", ["see {{ messages | length }} turns", "{{ messages[0].content | upper }}"])
def test_a_last_turn_whose_context_is_rewritten_is_refused(tmp_path: Path, words: str) -> None:
    """What the target was shown when it began to speak is not what the whole text begins with."""
    renderer = Renderer(save_tokenizer(tmp_path, "{% if messages[-1].role == 'assistant' %}" + words + "{% endif %}" +
                                       CHATML))
    with pytest.raises(TemplateError, match="rewrites the conversation before turn 2"):
        renderer.render(talk("a", "b"), "corpus")


THINKS = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.last %}<think>"
          "{{ m.reasoning_content }}</think>{% endif %}{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}")


def thought(reasoning: str | None, content: str) -> Message:
    return Message("assistant", content, reasoning_content=reasoning)


@settings(max_examples=60)
@given(st.lists(st.tuples(texts, texts.filter(lambda t: "think" not in t)), min_size=1, max_size=3))
def test_thoughts_are_supervised_in_the_last_turn_and_history_without_them_is_context(
        thinking: Renderer, turns: list[tuple[str, str]]) -> None:
    messages = [message for reasoning, text in turns for message in (Message("user", "?"), thought(reasoning, text))]
    rendered = thinking.render(messages, "corpus")
    reasoning, text = turns[-1]
    # The prompt opens the thoughts, and the target said what comes after that; without thoughts it begins before them.
    last = f"{reasoning}</think>{text}{CLOSE}" if reasoning else f"{text}{CLOSE}"
    # An earlier turn without thoughts reads the same in the history, and counts there.
    earlier = "".join(f"{text}{CLOSE}" for reasoning, text in turns[:-1] if not reasoning)
    assert spoken(thinking, rendered) == earlier + last


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(save_tokenizer(tmp_path_factory.mktemp("thinks"), THINKS))


def test_words_that_the_template_leaves_out_are_refused_with_where_they_belong(thinking: Renderer) -> None:
    with pytest.raises(TemplateError, match=r"leaves out words of turn 2; thoughts belong in `reasoning_content`"):
        thinking.render(talk("a", "because</think>b"), "corpus")


def test_a_turn_that_is_context_alone_is_not_masked(chatml: Renderer) -> None:
    messages = [*talk("a"), Message("assistant", "b", supervised=False), *talk("c", "d")]
    assert spoken(chatml, chatml.render(messages, "corpus")) == f"d{CLOSE}"
    only = [*talk("a"), Message("assistant", "b", supervised=False)]
    with pytest.raises(TemplateError, match="no token of the conversation belongs to the assistant"):
        chatml.render(only, "corpus")
    trailing = [*talk("a", "b", "c"), Message("assistant", "d", supervised=False)]
    assert spoken(chatml, chatml.render(trailing, "corpus")) == f"b{CLOSE}"


def test_a_response_that_was_cut_off_is_not_said_to_have_ended(chatml: Renderer) -> None:
    rendered = chatml.render([*talk("a"), Message("assistant", "and then", ended=False)], "corpus")
    assert spoken(chatml, rendered) == "and then"
    assert rendered.loss_mask_T[-1]
    with pytest.raises(TemplateError, match="no token of the conversation belongs to the assistant"):
        chatml.render([*talk("a"), Message("assistant", "", ended=False)], "corpus")


MARKED = CHATML.replace("{{ m.content }}<|im_end|>", "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
                        "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}")


def test_a_templates_own_marks_must_name_the_same_words(tmp_path: Path) -> None:
    renderer = Renderer(save_tokenizer(tmp_path / "marked", MARKED))
    assert spoken(renderer, renderer.render(talk("a", "b c", "d", "e"), "corpus")) == f"b c{CLOSE}e{CLOSE}"
    wrong = MARKED.replace("{% generation %}{{ m.content }}", "{{ m.content }}{% generation %}")
    with pytest.raises(TemplateError, match="own generation marks name other words of the assistant"):
        Renderer(save_tokenizer(tmp_path / "wrong", wrong)).render(talk("a", "b c"), "corpus")


def test_tools_and_calls_reach_the_template(tmp_path: Path) -> None:
    template = ("{% if tools %}tools: {{ tools[0].function.name }};{% endif %}{% for m in messages %}<|im_start|>"
                "{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>"
                "{% endfor %}"
                "{{ m.tool_call_id or '' }}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    renderer = Renderer(save_tokenizer(tmp_path, template))
    call = json.dumps([{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}])
    tools = json.dumps([{"type": "function", "function": {"name": "add", "parameters": {}}}])
    messages = [Message("user", "1 + 1?", tools=tools), Message("assistant", "", tool_calls=call),
                Message("tool", "2", tool_call_id="x7"), Message("assistant", "It is 2.")]
    rendered = renderer.render(messages, "corpus")
    assert spoken(renderer, rendered) == f"<call>add</call>{CLOSE}It is 2.{CLOSE}"
    text = decode(renderer, rendered.token_ids_T)
    assert text.startswith("tools: add;")
    assert "2x7" in text


DATED = "today is {{ strftime_now('%d %b %Y') }};" + CHATML


def test_a_template_that_prints_the_date_is_told_the_day_of_the_run(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, DATED)
    dated = Renderer(folder, today=date(2024, 2, 29))
    assert decode(dated, dated.render(talk("a"), "target").token_ids_T).startswith("today is 29 Feb 2024;")
    assert decode(dated, dated.render(talk("a", "b"), "corpus").token_ids_T).startswith("today is 29 Feb 2024;")
    undated = Renderer(folder)
    assert str(date.today().year) in decode(undated, undated.render(talk("a"), "target").token_ids_T)


def test_a_tokenizer_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization.Mine", null]}}')
    (tmp_path / "tokenization.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(UsageError, match=r"the tokenizer of .* cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("template", "text"), [(REFUSES, "roles must alternate"), (BROKEN, ""), (UNDEFINED, "")])
@pytest.mark.parametrize("responses", ["target", "corpus"])
def test_a_template_that_fails_is_refused_with_its_reason(tmp_path: Path, template: str, text: str,
                                                          responses: str) -> None:
    renderer = Renderer(save_tokenizer(tmp_path, template))
    with pytest.raises(TemplateError, match=f"the chat template refuses the conversation: .*{text}"):
        renderer.render(talk("a", "b")[:1 if responses == "target" else 2], responses)


def test_a_conversation_without_the_assistant_is_refused(chatml: Renderer) -> None:
    with pytest.raises(TemplateError, match="no token of the conversation belongs to the assistant"):
        chatml.render(talk("a"), "corpus")


def test_a_response_that_the_template_swallows_is_refused(tmp_path: Path) -> None:
    silent = "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    renderer = Renderer(save_tokenizer(tmp_path, silent))
    with pytest.raises(TemplateError, match="leaves out words of turn 2"):
        renderer.render(talk("a", "b"), "corpus")


@pytest.mark.parametrize("start_token", [True, False])
def test_without_a_template_texts_are_joined_and_the_start_token_comes_once(tmp_path: Path, start_token: bool) -> None:
    renderer = Renderer(save_tokenizer(tmp_path, None, start_token))
    start = "<|endoftext|>" * start_token
    rendered = renderer.render(talk("Once upon", " a time", " there", " was"), "corpus")
    assert decode(renderer, rendered.token_ids_T) == f"{start}Once upon a time there was"
    assert spoken(renderer, rendered) == " a time was"
    prompt = renderer.render(talk("Once upon"), "target")
    assert decode(renderer, prompt.token_ids_T) == f"{start}Once upon"


def test_with_a_template_no_start_token_is_added(tmp_path: Path) -> None:
    renderer = Renderer(save_tokenizer(tmp_path, CHATML, start_token=True))
    rendered = renderer.render(talk("a", "b"), "corpus")
    assert renderer.tokenizer.convert_tokens_to_ids("<|endoftext|>") not in rendered.token_ids_T


def test_the_prompts_of_a_run_that_goes_on_after_midnight_do_not_change(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, DATED)
    spec = RunSpec(target=TargetSpec(name="t", revision="r", architecture="A", dtype="float32", vocab_size=9,
                                     hidden_size=1, num_layers=1, tokenizer_sha256="0" * 64),
                   corpus=CorpusSpec(files=(), prompts=1), responses="target", sampling=None, capture=CaptureSpec(),
                   engine=EngineSpec(name="none", version="0", max_model_len=9), prompts_per_shard=1)
    run = Run(fingerprint=spec.fingerprint, spec=spec, plan=(), created_by="test",
              created_at="2024-02-29T23:59:58+00:00")
    renderer = start_renderer(run, str(folder), None)
    assert decode(renderer, renderer.render(talk("a"), "target").token_ids_T).startswith("today is 29 Feb 2024;")
