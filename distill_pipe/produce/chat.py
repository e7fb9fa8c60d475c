"""Conversations to token ids and loss masks, by the target's own chat template.

The text is tokenised piece by piece, cut where the assistant begins and ends (`loss_mask`), exactly as serving does
(prompt first, response after), so the masked tokens decode to the assistant's text and nothing else. Where a template
has `{% generation %}` marks, what they mark must be the same.

Templates that print today's date are told the day a run was created, so that the prompts of a run that goes on after
midnight do not change.

Shapes: T tokens.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from distill_pipe.errors import UsageError
from distill_pipe.produce.loss_mask import TemplateError, cut_at_turns
from distill_pipe.produce.template import ChatTemplate, Rendered
from distill_pipe.produce.tiktoken_file import download_tokenizer, tokenizer_folder
from distill_pipe.store.manifest import Run
from distill_pipe.store.plan import Message
from distill_pipe.store.spec import Responses, RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\b")


class TooLongError(ValueError):
    """The prompt does not fit the target's context; it is quarantined."""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """Token ids and loss mask. With responses by the target the mask is all False: the response comes later."""

    token_ids_T: list[int]
    loss_mask_T: list[bool]


def load_tokenizer(model: Path | str, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder or hub model. Python files of a model are not run.

    Raises:
        UsageError: there is none that can be read.
    """
    from transformers import AutoTokenizer

    converted = tokenizer_folder(model, revision)
    try:
        if converted is not None:
            return AutoTokenizer.from_pretrained(converted, trust_remote_code=False)
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if converted is None and download_tokenizer(model, revision):
            return load_tokenizer(model, revision)
        raise UsageError(f"the tokenizer of {model} cannot be read: {str(error).splitlines()[0]}") from None


class Renderer:
    """The target's tokenizer and chat template. `today` is what the template is told; by default the day it is."""

    _marks = False

    def __init__(self, model: Path | str, revision: str | None = None, today: date | None = None) -> None:
        self.tokenizer = load_tokenizer(model, revision)
        self._special = set(self.tokenizer.all_special_ids) | {
            i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        self._marks = _GENERATION_MARK.search(str(self.tokenizer.chat_template or "")) is not None
        self._template = None if self.tokenizer.chat_template is None else ChatTemplate(
            str(self.tokenizer.get_chat_template()), self.tokenizer.special_tokens_map, today)

    def render(self, messages: Sequence[Message], responses: Responses) -> RenderedPrompt:
        """Render one conversation.

        Raises:
            TemplateError: the template refuses it, or changes it so that the assistant's words cannot be told.
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
        for piece in cut_at_turns(messages, self._text):
            ids = self._encode(piece.text, first=not token_ids)
            token_ids += ids
            mask += [True] * self._closing(ids) if piece.spoken else [False] * len(ids)
            mask += [False] * (len(token_ids) - len(mask))
        _cut_after_the_mask(token_ids, mask)
        if self._marks:
            self._require_same_marks(messages, token_ids, mask)
        last = messages[_last_index(messages)]
        if last.supervised and not last.ended and token_ids and token_ids[-1] in self._special:
            # It was cut off: the target did not say that it was done.
            mask[-1] = False
            _cut_after_the_mask(token_ids, mask)
        if not mask:
            raise TemplateError("no token of the conversation belongs to the assistant")
        return RenderedPrompt(token_ids, mask)

    def _require_same_marks(self, messages: Sequence[Message], token_ids: list[int], mask: list[bool]) -> None:
        """Compare with the template's own marks. Only texts can be compared: tokens differ where pieces meet."""
        if not all(m.supervised for m in messages):
            return
        marked = self._render(messages[:_last_index(messages) + 1], generate=False).marked
        theirs = [token for text in marked for token in self._encode(text, first=False)]
        ours = [token for token, said in zip(token_ids, mask, strict=True) if said]
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (theirs, ours)]
        if texts[0] != texts[1]:
            raise TemplateError("the template's own generation marks name other words of the assistant "
                                f"({len(texts[0])} characters, not {len(texts[1])})")

    def _closing(self, ids: list[int]) -> int:
        """Tokens up to and with the turn's closing special token; what the template adds after it is nobody's word."""
        ends = [i for i, token in enumerate(ids) if token in self._special]
        return ends[-1] + 1 if ends else len(ids)

    def _text(self, messages: Sequence[Message], generate: bool) -> str:
        return "".join(m.content for m in messages) if self._template is None else self._render(messages, generate).text

    def _render(self, messages: Sequence[Message], generate: bool) -> Rendered:
        assert self._template is not None  # noqa: S101 - for the type checker
        tools = messages[0].tools if messages else None
        return self._template.render([_turn(m) for m in messages], None if tools is None else json.loads(tools),
                                     generate)

    def _encode(self, text: str, first: bool) -> list[int]:
        """Token ids of one piece. Only a plain text (no template) gets the tokenizer's own start token."""
        special = first and self._template is None
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])


def run_date(run: Run) -> date:
    """The day a run was created, which is today for all of its prompts."""
    return date.fromisoformat(run.created_at[:10])


def _turn(message: Message) -> dict[str, object]:
    """A message as templates know it; gpt-oss's calls the thoughts `thinking`."""
    turn: dict[str, object] = {"role": message.role, "content": message.content}
    if message.reasoning_content is not None:
        turn |= {"reasoning_content": message.reasoning_content, "thinking": message.reasoning_content}
    if message.tool_calls is not None:
        turn["tool_calls"] = json.loads(message.tool_calls)
    return turn | {name: value for name in ("tool_call_id", "name") if (value := getattr(message, name)) is not None}


def _cut_after_the_mask(token_ids: list[int], mask: list[bool]) -> None:
    """Drop what follows the last supervised token: it supervises nothing."""
    end = next((i for i in range(len(mask), 0, -1) if mask[i - 1]), 0)
    del token_ids[end:], mask[end:]


def _last_index(messages: Sequence[Message]) -> int:
    return max(i for i, m in enumerate(messages) if m.role == "assistant")
