"""Catches a turn, a tool, a thought or a label of a record that is lost or changed on its way into the plan."""

import json

import pytest

from distill_pipe.errors import UsageError
from distill_pipe.produce.records import domain_of, messages_of, prompt_id
from distill_pipe.store.plan import Message

CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
ASKED = {"role": "user", "content": "1 + 1?"}


def only(record: dict[str, object]) -> Message:
    (*_, message) = messages_of(record, "c.jsonl:1")
    return message


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_go_by_several_names(field: str) -> None:
    record = {"messages": [ASKED, {"role": "assistant", "content": "2", field: "one and one"}]}
    assert only(record) == Message("assistant", "2", reasoning_content="one and one")


@pytest.mark.parametrize(("turn", "wanted"), [
    ({"role": "assistant", "content": "2", "reasoning_content": None, "weight": None}, Message("assistant", "2")),
    ({"role": "assistant", "content": "2", "weight": 0}, Message("assistant", "2", supervised=False)),
    ({"role": "assistant", "content": "2", "weight": 1}, Message("assistant", "2")),
    ({"role": "tool", "content": "2", "tool_call_id": "x7", "name": "add"},
     Message("tool", "2", tool_call_id="x7", name="add")),
    ({"role": "assistant", "content": None, "tool_calls": CALL},
     Message("assistant", "", tool_calls=json.dumps(CALL)))])
def test_what_a_turn_says_of_itself_is_kept(turn: dict[str, object], wanted: Message) -> None:
    assert only({"messages": [ASKED, turn]}) == wanted


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [{**TOOLS[0], "strict": None}]])
def test_tools_are_a_list_or_its_text_and_go_on_the_first_turn(tools: object) -> None:
    first, second = messages_of({"messages": [ASKED, {"role": "assistant", "content": "2"}], "tools": tools}, "here")
    assert json.loads(first.tools or "") == TOOLS
    assert second.tools is None
    assert messages_of({"prompt": "a", "tools": []}, "here") == (Message("user", "a"),)


def test_a_targets_completion_is_a_response_that_may_have_been_cut_off() -> None:
    record = {"id": "7", "conversation": [ASKED], "generated_message": {"role": "assistant", "content": "2"},
              "finish_reason": "stop"}
    assert messages_of(record, "here") == (Message("user", "1 + 1?"), Message("assistant", "2"))
    assert only(record | {"finish_reason": "length"}) == Message("assistant", "2", ended=False)


@pytest.mark.parametrize(("label", "domain"), [
    (["programming and software development", "mathematical ability"], "code"),
    (["logic and reasoning", "mathematical ability"], "maths"), (["creativity and design"], "general"), ([], None)])
def test_abilities_of_infinity_instruct_come_to_a_domain(label: list[str], domain: str | None) -> None:
    record: dict[str, object] = {"label": {"ability_en": [], "cate_ability_en": label}}
    assert domain_of(record, "here") == domain
    assert domain_of(record | {"domain": "mine"}, "here") == "mine"
    assert domain_of({"label": "7"}, "here") is None


@pytest.mark.parametrize(("record", "message"), [
    ({"messages": [ASKED], "tools": "{"}, "`tools` is not JSON"),
    ({"messages": [ASKED], "tools": {"a": 1}}, "`tools` must be a list of objects"),
    ({"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": ["x"]}]},
     "`tool_calls` must be a list of objects"),
    ({"messages": [ASKED, {"role": "assistant", "content": "2", "thinking": ["x"]}]},
     "a turn's reasoning_content is not text"),
    ({"messages": [{**ASKED, "name": 3}]}, "a turn's name is not text"),
    ({"conversation": [ASKED], "generated_message": "2"}, "`generated_message` is not a turn"),
    ({"generated_message": {"content": "2"}}, "`conversation` must be a list of at least one turn")])
def test_a_record_that_is_misshapen_is_refused(record: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=rf"c\.jsonl:1: {message}"):
        messages_of(record, "c.jsonl:1")


def test_prompts_that_differ_in_thoughts_or_tools_alone_have_ids_of_their_own() -> None:
    prompts = [(Message("user", "a"),), (Message("user", "a", tools="[]"),),
               (Message("user", "a"), Message("assistant", "b")),
               (Message("user", "a"), Message("assistant", "b", reasoning_content="c"))]
    assert len({prompt_id({}, messages, "here") for messages in prompts}) == len(prompts)
