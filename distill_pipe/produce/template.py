"""A target's chat template, run where it can do no harm: in a process of its own that has a sandbox, ten seconds per
conversation, half a GiB, and nothing of our environment.

The price is a small process per engine, which starts in a tenth of a second, and a round trip of a tenth of a
millisecond per rendering. The sandbox is Jinja's: a way out of it would end in that process, with the user's rights.
"""

import os
import subprocess
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

import msgspec

from distill_pipe.produce.loss_mask import TemplateError
from distill_pipe.produce.template_process import FIRST, LAST, Answer, Conversation, Setup

SECONDS = 10.0
MEMORY_BYTES = 512 << 20
CHARACTERS = 16 << 20
_INHERITED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "SYSTEMROOT")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text, and the parts of it that the template itself marks as the assistant's."""

    text: str
    marked: list[str]


class ChatTemplate:
    """Renders conversations with the tokenizer's special tokens; `today` is what the template is told. A process that
    ran out of time is replaced."""

    def __init__(self, template: str, variables: Mapping[str, object], today: date | None = None,
                 seconds: float = SECONDS) -> None:
        self._setup = Setup(template, dict(variables), None if today is None else today.isoformat(), seconds,
                            MEMORY_BYTES, CHARACTERS)
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, messages: list[dict[str, object]], tools: list[object] | None, generate: bool) -> Rendered:
        """The text of a conversation; `generate` opens the assistant's turn.

        Raises:
            TemplateError: the template refuses, or takes more time, memory or text than it may.
        """
        line = self._ask(msgspec.json.encode(Conversation(messages, tools, generate)))
        if not line:
            self._process = None
            raise TemplateError(f"the chat template takes more than {self._setup.seconds:g} s, or crashes")
        answer = msgspec.json.decode(line, type=Answer)
        if answer.text is None:
            raise TemplateError(f"the chat template refuses the conversation: {answer.error}")
        marked = [part.partition(LAST)[0] for part in answer.text.split(FIRST)[1:]]
        return Rendered(answer.text.replace(FIRST, "").replace(LAST, ""), marked)

    def _ask(self, line: bytes) -> bytes:
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 - for the type checker
        try:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return b""
        return process.stdout.readline()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        process = subprocess.Popen([sys.executable, "-m", "distill_pipe.produce.template_process"],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        weakref.finalize(self, _end, process)
        assert process.stdin is not None  # noqa: S101 - for the type checker
        process.stdin.write(msgspec.json.encode(self._setup) + b"\n")
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                continue
