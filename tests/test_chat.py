"""Catches a loss mask that covers anything but the assistant's words, and templates that make that impossible."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distill_pipe.produce.chat import RenderedPrompt, Renderer, TemplateError
from distill_pipe.store.plan import Message

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


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


def test_a_template_that_rewrites_what_was_said_is_refused(tmp_path: Path) -> None:
    renderer = Renderer(save_tokenizer(tmp_path, FORGETS))
    assert spoken(renderer, renderer.render(talk("a", "b"), "corpus")) == f"b{CLOSE}"
    with pytest.raises(TemplateError, match="rewrites the conversation before turn 4"):
        renderer.render(talk("a", "b", "c", "d"), "corpus")


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
    with pytest.raises(TemplateError, match="no token of the conversation belongs to the assistant"):
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
