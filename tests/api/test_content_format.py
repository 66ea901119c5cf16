"""Words reach the prompt whatever form they come in and whatever form the template wants."""

from __future__ import annotations

import pytest

from disagg.api.request.request_checks import Messages
from disagg.api.text.template import ChatTemplate

PARTS = [{"type": "text", "text": "hello"}]
LOOP = "{% for p in CONTENT %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
TEMPLATES = {
    "string": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    "parts": "{% for m in messages %}<{{ m.role }}>" + LOOP.replace("CONTENT", "m.content") + "{% endfor %}",
    "item": "{% for m in messages %}<{{ m.role }}>" + LOOP.replace("CONTENT", "m['content']") + "{% endfor %}",
    "filter": "{% for m in messages %}<{{ m.role }}>" + LOOP.replace("CONTENT", "m.content | list") + "{% endfor %}",
    "slice": "{% for m in messages %}<{{ m.role }}>" + LOOP.replace("CONTENT", "m.content[:9]") + "{% endfor %}",
    "set": "{% for m in messages %}{% set c = m.content %}<{{ m.role }}>"
    + LOOP.replace("CONTENT", "c")
    + "{% endfor %}",
    "macro": "{% macro show(items) %}"
    + LOOP.replace("CONTENT", "items")
    + "{% endmacro %}{% for m in messages %}<{{ m.role }}>{{ show(m.content) }}{% endfor %}",
    "first part": "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text }}{% endfor %}",
    "letters": "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}",
    "both": "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    + LOOP.replace("CONTENT", "m.content")
    + "{% endif %}{% endfor %}",
    "strict": "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}<user>"
    + LOOP.replace("CONTENT", "messages[0].content"),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", ["hello", PARTS], ids=["string", "parts"])
def test_words_reach_the_prompt_in_either_form(name: str, content: object) -> None:
    assert ChatTemplate(TEMPLATES[name], {}).render([{"role": "user", "content": content}]) == "<user>hello"


@pytest.mark.parametrize("content", ["hello", PARTS], ids=["string", "parts"])
def test_each_role_is_given_what_its_branch_wants(content: object) -> None:
    """Many templates print the system's text as it is and loop over the user's parts only."""
    source = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'system' %}{{ m.content }}{% else %}"
        + LOOP.replace("CONTENT", "m.content")
        + "{% endif %}{% endfor %}"
    )
    messages = [{"role": role, "content": content} for role in ("system", "user", "assistant")]
    assert ChatTemplate(source, {}).render(messages) == "<system>hello<user>hello<assistant>hello"


def test_a_template_that_can_take_both_gets_parts_as_vllm_sends_them() -> None:
    source = "{% for m in messages %}{% if m.content is string %}S{{ m.content }}{% else %}"
    source += LOOP.replace("CONTENT", "m.content") + "{% endif %}{% endfor %}"
    assert ChatTemplate(source, {}).render([{"role": "user", "content": "hello"}]) == "hello"


@pytest.mark.parametrize("name", ["string", "parts", "both"])
@pytest.mark.parametrize(
    "extra",
    [
        {"content": None},
        {},
        {"content": "", "tool_calls": [], "annotations": [], "refusal": None, "audio": None, "function_call": None},
    ],
)
def test_an_answer_sent_back_without_text_adds_no_words(name: str, extra: dict[str, object]) -> None:
    messages = Messages()([{"role": "user", "content": "hello"}, {"role": "assistant", **extra}])
    assert ChatTemplate(TEMPLATES[name], {}).render(messages) == "<user>hello<assistant>"


def test_an_answer_sent_back_as_it_came_is_taken() -> None:
    answer = {"role": "assistant", "content": "hi", "refusal": None, "annotations": [], "tool_calls": [], "name": "a"}
    assert Messages()([answer]) == ({"role": "assistant", "content": "hi", "name": "a"},)
