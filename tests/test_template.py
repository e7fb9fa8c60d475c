"""Catches a chat template that writes other text than transformers would, or that can hang, fill or reach anything."""

import gc
import os
import time
from datetime import date
from pathlib import Path

import pytest

from distill_pipe.produce.loss_mask import TemplateError
from distill_pipe.produce.smollm2 import materialise_smollm2
from distill_pipe.produce.targets import resolve_target
from distill_pipe.produce.template import ChatTemplate

TALK = [{"role": "system", "content": "Be <brief> & \"kind\"."}, {"role": "user", "content": "Grüße, 世界\n"},
        {"role": "assistant", "content": "  Hi! ", "tool_calls": [{"name": "f", "arguments": {"x": [1, None]}}]}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "tokens": "{{ bos_token }}{% for m in messages %}{{ m['content'] | trim }}{{ eos_token }}{% endfor %}",
    "json": "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}",
    "generation": ("{% for m in messages %}\n{% generation %}\n{% set x = 1 %}[{{ m.content }}]\n{% endgeneration %}\n"
                   "{{ x }}{% endfor %}"),
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "date": "{{ strftime_now('%Y') }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "tools": "{{ tools | tojson }}{{ messages[-1].tool_calls[0].arguments | tojson }}{{ documents }}",
    "prompt": "{{ add_generation_prompt }}",
    "method": "{{ messages[0].content.upper() }}{{ messages[0]['content'].split(' ')[-1] }}",
}


def theirs(template: str, generate: bool) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    [text], _ = render_jinja_template([TALK], TOOLS, chat_template=template, add_generation_prompt=generate, **TOKENS)
    return str(text)


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_writes_what_transformers_would(name: str, generate: bool) -> None:
    assert ChatTemplate(TEMPLATES[name], TOKENS).render(TALK, TOOLS, generate).text == theirs(TEMPLATES[name], generate)


def test_what_the_template_marks_as_generated_is_told_apart() -> None:
    rendered = ChatTemplate(TEMPLATES["generation"], TOKENS).render(TALK, None, generate=False)
    assert rendered.marked == [f"[{turn['content']}]\n" for turn in TALK]


def test_the_day_is_the_one_that_was_given() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", TOKENS, date(2024, 2, 29))
    assert template.render(TALK, None, generate=False).text == "29 Feb 2024"


@pytest.mark.parametrize("folder", [materialise_smollm2, lambda: resolve_target("fake").folder])
def test_templates_of_real_targets_write_what_transformers_would(folder) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder())
    ours = ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map)
    for count in (2, 3):
        for generate in (True, False):
            assert ours.render(TALK[:count], None, generate).text == tokenizer.apply_chat_template(
                TALK[:count], tokenize=False, add_generation_prompt=generate)


@pytest.mark.parametrize(("template", "says"), [
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{{ messages.__class__.__init__.__globals__ }}", "unsafe"),
    ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
    ("{{ messages.append({'role': 'x'}) }}", "unsafe"),
    ("{{ ('%s' * 10).format(messages) }}{{ '{0.__class__.__base__}'.format('') }}", "unsafe|not safe"),
    ("{% for a in range(10**9) %}{% endfor %}", "range"),
    ("{{ 'a' * 10**10 }}", "too much memory"),
    ("{% for a in range(99999) %}{{ 'a' * 10000 }}{% endfor %}", "more than 16777216 characters"),
    ("{% set n = namespace(x='a') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "too much memory"),
    ("{% import 'os' as os %}", "no loader"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
])
def test_a_hostile_template_gets_nowhere_and_the_next_conversation_is_told_the_same(template: str, says: str) -> None:
    hostile = ChatTemplate(template, TOKENS)
    for _ in range(2):
        with pytest.raises(TemplateError, match=f"(?s)refuses the conversation: .*({says})"):
            hostile.render(TALK, None, generate=True)


def test_a_template_that_never_ends_is_ended_and_others_go_on() -> None:
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = ChatTemplate("{% if messages | length > 2 %}" + loops + "{% endif %}done", TOKENS, seconds=5)
    started = time.monotonic()
    with pytest.raises(TemplateError, match="takes more than 5 s"):
        template.render(TALK, None, generate=True)
    assert time.monotonic() - started < 120
    assert template.render(TALK[:2], None, generate=True).text == "done"


def test_a_template_s_process_sees_no_secret_and_ends_with_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_itisasecret")
    template = ChatTemplate("x", TOKENS)
    assert template.render(TALK, None, generate=True).text == "x"
    process = template._process
    assert process is not None
    assert b"hf_itisasecret" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    del template
    gc.collect()
    assert process.poll() is not None
    assert not os.path.exists(f"/proc/{process.pid}/cmdline")
