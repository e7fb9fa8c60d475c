"""The process in which a chat template runs: `python -m distill_pipe.produce.template_process`, started by `template`.

A template is a program from the target's repository. It runs in Jinja's immutable sandbox, and this process has little
memory, a clock that ends it, and none of its parent's environment. What a template may use is what transformers gives
it, so that it writes the same text.

The first line on stdin says what to run (`Setup`), each further one is a `Conversation`; each is answered by a
line on stdout (`Answer`).
"""

import json
import resource
import signal
import sys
from datetime import date, datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import msgspec

# Noncharacters, which Unicode keeps out of any text that is passed on.
FIRST, LAST = "\ufdd0", "\ufdd1"


class Setup(msgspec.Struct, frozen=True):
    """A template, the tokenizer's special tokens by name, the day that it is told (ISO; None means the true one), and
    what each rendering may take."""

    template: str
    variables: dict[str, Any]
    today: str | None
    seconds: float
    memory_bytes: int
    characters: int


class Conversation(msgspec.Struct, frozen=True):
    """What to render; `generate` asks for the assistant's turn to be opened."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    generate: bool


class Answer(msgspec.Struct, frozen=True):
    """The text, with FIRST before and LAST after what the template marks as generated, or why there is none."""

    text: str | None
    error: str = ""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        first, last = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]) for mark in (FIRST, LAST))
        return [first.set_lineno(line), jinja2.nodes.Scope(body).set_lineno(line), last.set_lineno(line)]


def _compiled(setup: Setup) -> jinja2.Template:
    day = None if setup.today is None else date.fromisoformat(setup.today)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: (day or datetime.now()).strftime(form)
    return environment.from_string(setup.template)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _rendered(template: jinja2.Template, setup: Setup, asked: Conversation) -> str:
    parts, length = [], 0
    for part in template.generate(messages=asked.messages, tools=asked.tools, documents=None,
                                  add_generation_prompt=asked.generate, **setup.variables):
        parts.append(part)
        length += len(part)
        if length > setup.characters:
            raise jinja2.TemplateError(f"it writes more than {setup.characters} characters")
    return "".join(parts)


def main() -> None:
    """Answer conversations until the input ends."""
    setup = msgspec.json.decode(sys.stdin.buffer.readline(), type=Setup)
    resource.setrlimit(resource.RLIMIT_AS, (setup.memory_bytes, setup.memory_bytes))
    template = None
    for line in sys.stdin.buffer:
        # Nobody handles this signal: when time is up, the process is gone.
        signal.setitimer(signal.ITIMER_REAL, setup.seconds)
        try:
            template = template or _compiled(setup)
            answer = Answer(_rendered(template, setup, msgspec.json.decode(line, type=Conversation)))
        except MemoryError:
            answer = Answer(None, "it takes too much memory")
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            answer = Answer(None, str(error) or type(error).__name__)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
