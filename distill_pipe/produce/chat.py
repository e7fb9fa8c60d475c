"""Conversations to token ids and loss masks, by the target's own chat template.

A loss mask is found by rendering prefixes: what turn i adds to the text, after the generation prompt, is what the
assistant said. Templates' own `{% generation %}` marks are absent from nearly every model. The text is tokenised piece
by piece, cut where the assistant begins and ends, exactly as serving does (prompt first, response after), so the masked
tokens decode to the assistant's text and nothing else.

Shapes: T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distill_pipe.store.plan import Message
from distill_pipe.store.spec import Responses, RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TemplateError(ValueError):
    """The conversation cannot be rendered so that the assistant's words are known; the prompt is quarantined."""


class TooLongError(ValueError):
    """The prompt does not fit the target's context; it is quarantined."""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """Token ids and loss mask. With responses by the target the mask is all False: the response comes later."""

    token_ids_T: list[int]
    loss_mask_T: list[bool]


class Renderer:
    """The target's tokenizer and chat template."""

    def __init__(self, folder: Path | str, revision: str | None = None) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, revision=revision)
        self._special = set(self.tokenizer.all_special_ids) | {
            i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}

    def render(self, messages: Sequence[Message], responses: Responses) -> RenderedPrompt:
        """Render one conversation.

        Raises:
            TemplateError: the template refuses it, or rewrites earlier turns so that no prefix stays a prefix.
        """
        if responses == "target":
            ids = self._encode(self._text(messages, generate=True), first=True)
            return RenderedPrompt(ids, [False] * len(ids))
        return self._render_given(messages)

    def render_fitting(self, messages: Sequence[Message], spec: RunSpec) -> RenderedPrompt:
        """Render one conversation of a run.

        Raises:
            TemplateError: as `render`, or nothing of the conversation could be supervised.
            TooLongError: it does not fit the context length.
        """
        rendered = self.render(messages, spec.responses)
        # The target needs room for one more token; of a given text the last token is not computed.
        if len(rendered.token_ids_T) > spec.engine.max_model_len - (spec.responses == "target"):
            raise TooLongError(f"{len(rendered.token_ids_T)} tokens do not fit the context length of "
                               f"{spec.engine.max_model_len}")
        if len(rendered.token_ids_T) < 2 and spec.responses == "corpus":
            raise TemplateError("the conversation is a single token; nothing predicts it")
        return rendered

    def _render_given(self, messages: Sequence[Message]) -> RenderedPrompt:
        token_ids: list[int] = []
        mask: list[bool] = []
        done = ""
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before, after = self._text(messages[:i], generate=True), self._text(messages[:i + 1], generate=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise TemplateError(f"the chat template rewrites the conversation before turn {i + 1}")
            for text, spoken in ((before[len(done):], False), (after[len(before):], True)):
                ids = self._encode(text, first=not token_ids)
                token_ids += ids
                mask += [True] * self._closing(ids) if spoken else [False] * len(ids)
                mask += [False] * (len(token_ids) - len(mask))
            done = after
        if not any(mask):
            raise TemplateError("no token of the conversation belongs to the assistant")
        while not mask[-1]:
            token_ids.pop()
            mask.pop()
        return RenderedPrompt(token_ids, mask)

    def _closing(self, ids: list[int]) -> int:
        """Tokens up to and with the turn's closing special token; what the template adds after it is nobody's word."""
        ends = [i for i, token in enumerate(ids) if token in self._special]
        return ends[-1] + 1 if ends else len(ids)

    def _text(self, messages: Sequence[Message], generate: bool) -> str:
        if self.tokenizer.chat_template is None:
            return "".join(m.content for m in messages)
        turns = [{"role": m.role, "content": m.content} for m in messages]
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise TemplateError(f"the chat template refuses the conversation: {error}") from error
        return str(text)

    def _encode(self, text: str, first: bool) -> list[int]:
        """Token ids of one piece. Only a plain text (no template) gets the tokenizer's own start token."""
        special = first and self.tokenizer.chat_template is None
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
