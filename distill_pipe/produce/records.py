"""A record of a corpus as a conversation, in any of the shapes that people keep them in.

    messages                            role, content; with reasoning_content, tool_calls, tool_call_id, name, weight
    conversations                       ShareGPT: from, value
    prompt [+ completion]               text or turns
    conversation + generated_message    completions by a target, with finish_reason
    tools                               beside any of them: a list of JSON schemas, or that as text

A record that cannot be understood stops the reading: silently dropping a prompt would be the worse surprise.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Final

import msgspec

from distill_pipe.errors import UsageError
from distill_pipe.store.plan import Message
from distill_pipe.store.shard import STRING_BYTES

Record = dict[str, object]
_SHAREGPT_ROLES: Final = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
                          "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system",
                          "tool": "tool", "observation": "tool", "function_call": "assistant"}
_ROLES: Final = {"system", "developer", "user", "assistant", "tool"}
_THOUGHTS: Final = ("reasoning_content", "reasoning", "thinking")
# Infinity-Instruct names the abilities that a prompt takes.
_ABILITIES: Final = (("programming", "code"), ("mathematical", "maths"))


def messages_of(record: Record, where: str) -> tuple[Message, ...]:
    """The turns of a record; its tools are on the first.

    Raises:
        UsageError: the record is in none of the shapes.
    """
    messages = _shaped(record, where)
    tools = record.get("tools")
    if tools is None or tools in ([], "", "[]"):
        return messages
    first = msgspec.structs.replace(messages[0], tools=_json_text(tools, "tools", where))
    return (first, *messages[1:])


def _shaped(record: Record, where: str) -> tuple[Message, ...]:
    if record.get("messages") is not None:
        return tuple(_message(turn, where) for turn in _turns(record["messages"], "messages", where))
    if record.get("generated_message") is not None:
        return _completed(record, where)
    if record.get("conversations") is not None:
        turns = _turns(record["conversations"], "conversations", where)
        return tuple(_message({"role": _SHAREGPT_ROLES.get(str(turn.get("from"))), "content": turn.get("value")}, where)
                     for turn in turns)
    if record.get("prompt") is not None:
        prompt = record["prompt"]
        asked: list[Record] = [{"role": "user", "content": prompt}]
        messages = [_message(turn, where) for turn in (asked if isinstance(prompt, str) else
                                                       _turns(prompt, "prompt", where))]
        if record.get("completion") is not None:
            messages.append(_message(_completion(record["completion"], where), where))
        return tuple(messages)
    raise UsageError(f"{where}: the record has none of the fields `messages`, `conversations`, `prompt`, "
                     "`generated_message`")


def _completed(record: Record, where: str) -> tuple[Message, ...]:
    """What a target was asked and answered; an answer that reached the limit has not ended."""
    said = record["generated_message"]
    if not isinstance(said, dict):
        raise UsageError(f"{where}: `generated_message` is not a turn")
    asked = [_message(turn, where) for turn in _turns(record.get("conversation"), "conversation", where)]
    answer = _message({"role": "assistant"} | said, where)
    return (*asked, msgspec.structs.replace(answer, ended=record.get("finish_reason") != "length"))


def _turns(value: object, field: str, where: str) -> list[Record]:
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise UsageError(f"{where}: `{field}` must be a list of at least one turn")
    return value


def _completion(value: object, where: str) -> Record:
    if isinstance(value, str):
        return {"role": "assistant", "content": value}
    turns = _turns(value, "completion", where)
    if len(turns) != 1:
        raise UsageError(f"{where}: `completion` must be one assistant turn")
    return turns[0] | {"role": "assistant"}


def _message(turn: Mapping[str, object], where: str) -> Message:
    role, content, calls = turn.get("role"), turn.get("content"), turn.get("tool_calls")
    if role not in _ROLES:
        raise UsageError(f"{where}: a turn has an unknown role; known are {', '.join(sorted(_ROLES))}")
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise UsageError(f"{where}: a turn's content is not text")
    thoughts = next((turn[name] for name in _THOUGHTS if turn.get(name)), None)
    texts = {"content": content, "reasoning_content": thoughts, "tool_call_id": turn.get("tool_call_id"),
             "name": turn.get("name")}
    for name, text in texts.items():
        if text is not None:
            _require_text(text, name, where)
    # A table has nulls where a turn says nothing.
    supervised = turn.get("supervised") is not False and turn.get("weight") != 0
    return msgspec.convert({"role": role, **texts, "tool_calls": _json_text(calls, "tool_calls", where) if calls else
                            None, "supervised": supervised, "ended": turn.get("ended") is not False}, Message)


def _require_text(value: object, name: str, where: str) -> None:
    if not isinstance(value, str):
        raise UsageError(f"{where}: a turn's {name} is not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: a turn holds characters that are not valid Unicode ({error.reason})") from None


def _json_text(value: object, field: str, where: str) -> str:
    """A list of objects as JSON, from a list or from its text; nulls that a table added to each go."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UsageError(f"{where}: `{field}` is not JSON") from None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UsageError(f"{where}: `{field}` must be a list of objects")
    return json.dumps(_without_nulls(value), ensure_ascii=False)


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def prompt_id(record: Record, messages: tuple[Message, ...], where: str) -> str:
    """The record's own id, or a hash of what is said in it."""
    for field in ("id", "prompt_id"):
        if isinstance(record.get(field), (str, int)):
            return _short(str(record[field]), field, where)
    digest = hashlib.sha256()
    for message in messages:
        digest.update(f"{message.role}\0{message.content}\0".encode())
        digest.update("\0".join(filter(None, (message.reasoning_content, message.tool_calls, message.tools))).encode())
    return digest.hexdigest()[:16]


def domain_of(record: Record, where: str) -> str | None:
    """The record's own label, or what Infinity-Instruct's label of abilities comes to: code, maths, or general."""
    domain = record.get("domain")
    if domain is None:
        label = record.get("label")
        abilities = label.get("cate_ability_en") if isinstance(label, dict) else None
        if not isinstance(abilities, list) or not abilities:
            return None
        text = " ".join(map(str, abilities))
        return next((name for word, name in _ABILITIES if word in text), "general")
    if not isinstance(domain, str):
        raise UsageError(f"{where}: `domain` is not text")
    return _short(domain, "domain", where)


def _short(text: str, field: str, where: str) -> str:
    """Readers of a dataset allow this much and no more, whatever a file claims."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: `{field}` holds characters that are not valid Unicode ({error.reason})") from None
    if size > STRING_BYTES:
        raise UsageError(f"{where}: `{field}` has {size} bytes; at most {STRING_BYTES} are stored")
    return text
