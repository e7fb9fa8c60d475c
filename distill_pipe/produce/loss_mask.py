"""Which part of a conversation's text the assistant said, found by rendering its prefixes.

Templates' own `{% generation %}` marks are absent from nearly every model, so turn i is what the text gains between the
prompt for it and its end. A turn is supervised where the whole text has it as it was spoken: templates that drop the
thoughts of earlier turns leave those as context, and only the last turn is certain to count. The trade-off: a prefix is
rendered per assistant turn, which for a long conversation is quadratic in characters and still far below the engine's
work.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distill_pipe.store.plan import Message

# Of a range that no text and no template uses.
_OTHER_WORDS = "\ue000"
TextOf = Callable[[Sequence[Message], bool], str]


class TemplateError(ValueError):
    """The conversation cannot be rendered so that the assistant's words are known; the prompt is quarantined."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the text; the parts in order are all of it."""

    text: str
    spoken: bool


def cut_at_turns(messages: Sequence[Message], text_of: TextOf) -> list[Piece]:
    """The text up to the end of the last given response, cut where the assistant begins and ends. `text_of` renders
    messages, with or without the prompt for the next response.

    Raises:
        TemplateError: no response is there to be supervised, or the template leaves out words of one.
    """
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
    if last < 0:
        raise TemplateError("no token of the conversation belongs to the assistant")
    whole = text_of(messages[:last + 1], False)
    pieces: list[Piece] = []
    cut = 0
    for i, message in enumerate(messages[:last + 1]):
        if message.role != "assistant" or not message.supervised:
            continue
        span = _span(messages, i, whole, text_of)
        if span is None or span[0] < cut:
            if i == last:
                raise TemplateError(f"the chat template rewrites the conversation before turn {i + 1}")
            continue
        pieces += [Piece(whole[cut:span[0]], False), Piece(whole[span[0]:span[1]], True)]
        cut = span[1]
    if not any(piece.spoken and piece.text for piece in pieces):
        raise TemplateError("no token of the conversation belongs to the assistant")
    return [*pieces, Piece(whole[cut:], False)]


def _span(messages: Sequence[Message], turn: int, whole: str, text_of: TextOf) -> tuple[int, int] | None:
    """Where the whole text has a turn as it was spoken; None when it has it otherwise, or not at all."""
    context, prompt = text_of(messages[:turn], False) if turn else "", text_of(messages[:turn], True)
    after = whole if turn + 1 == len(messages) else text_of(messages[:turn + 1], False)
    start = len(prompt)
    if not after.startswith(prompt):
        # Some templates open the thoughts in the prompt and not in the history. The turn then begins where the prompt
        # and any other words part ways; with these words it could be one that both happen to begin with.
        other = text_of([*messages[:turn], Message("assistant", _OTHER_WORDS)], False)
        start = min(_shared(prompt, other), _shared(prompt, after))
    if start < len(context) or not (after.startswith(context) and whole.startswith(after)):
        return None
    words = messages[turn].content.strip()
    if words not in after[start:]:
        raise TemplateError(f"the chat template leaves out words of turn {turn + 1}; thoughts belong in "
                            "`reasoning_content`")
    return start, len(after)


def _shared(a: str, b: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
