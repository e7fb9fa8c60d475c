"""Token counts of a corpus without a tokenizer: a token for every four bytes of text.

For a plan on a machine that cannot have the target's files. Four bytes to a token are what the tokenizers of our
presets make of English; code has fewer and rare scripts more, so counts are good to about a quarter, and the plan says
so. The ids stand for pieces of text, so that a prefix which two prompts share is still seen.
"""

import zlib
from collections.abc import Iterator, Sequence

from distill_pipe.produce.chat import RenderedPrompt, TooLongError
from distill_pipe.store.plan import Message
from distill_pipe.store.spec import RunSpec

BYTES_PER_TOKEN = 4
# What a chat template puts around a turn: its opening, the role, a line's end, and its closing.
TOKENS_PER_TURN = 5


class CharacterRenderer:
    """Stands in for `chat.Renderer` where only lengths matter."""

    def render_fitting(self, messages: Sequence[Message], spec: RunSpec) -> RenderedPrompt:
        """Ids and mask of about the right length.

        Raises:
            TooLongError: it does not fit the context length.
        """
        ids: list[int] = []
        mask: list[bool] = []
        for message in messages:
            spoken = list(_pieces(message.content))
            ids += [*range(TOKENS_PER_TURN), *spoken]
            mask += [False] * TOKENS_PER_TURN + [message.role == "assistant"] * len(spoken)
        if spec.responses == "target":
            ids, mask = [*ids, *range(TOKENS_PER_TURN - 1)], [False] * (len(ids) + TOKENS_PER_TURN - 1)
        if len(ids) > spec.engine.max_model_len - (spec.responses == "target"):
            raise TooLongError(f"about {len(ids)} tokens do not fit the context length of {spec.engine.max_model_len}")
        return RenderedPrompt(ids, mask)


def _pieces(text: str) -> Iterator[int]:
    data = text.encode()
    yield from (zlib.crc32(data[i:i + BYTES_PER_TOKEN]) for i in range(0, len(data), BYTES_PER_TOKEN))
