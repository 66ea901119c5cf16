"""Whether a chat template wants a message's content as a string or as parts: `[{"type": "text", "text": ...}]`.

A template that is given the wrong form often drops the words without an error: a loop over a string's characters finds
no part of type `text`. The source says what is meant, by a loop over `content`, as vLLM reads it; a word sent through
the template, role by role, says whether that holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from jinja2 import nodes

WORD: Final = "zebraquartz"  # no template has it in text of its own
ROLES: Final = ("user", "system", "assistant")  # in the order in which one's form is needed to ask for the next
SPILLED: Final = ("'type'", '"type"')  # a list of parts printed as it is, by a template that wants a string

Message = dict[str, Any]
Render = Callable[[Sequence[Message]], str | None]
"""The conversation as text, None when the template refuses it."""


@dataclass(frozen=True, slots=True)
class ContentFormat:
    """`by_role`: whether messages of a role are given as parts; `takes_parts` holds for every other role."""

    takes_parts: bool
    by_role: Mapping[str, bool]

    def apply(self, message: Message) -> Message:
        """The message in the form that the template wants. Parts are joined by newlines, as vLLM joins them."""
        content = message.get("content")
        if content is None:
            return message
        if self.by_role.get(message["role"], self.takes_parts):
            return message if isinstance(content, list) else {**message, "content": as_parts(content)}
        if isinstance(content, str):
            return message
        return {**message, "content": "\n".join(part["text"] for part in content)}


def as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def find_format(tree: nodes.Template, render: Render) -> ContentFormat:
    """The format of the template that `tree` is the source of and `render` the use."""
    by_source = loops_over_content(tree)
    by_role: dict[str, bool] = {}
    for role in ROLES:
        forms = (by_source, not by_source)
        by_role[role] = next((form for form in forms if _shows(render, role, {**by_role, role: form})), by_source)
    return ContentFormat(by_source, by_role)


def _shows(render: Render, role: str, by_role: Mapping[str, bool]) -> bool:
    """Whether a message of this role comes out as its word, and not as a list."""
    form = ContentFormat(False, by_role)
    text = render([form.apply({"role": name, "content": word}) for name, word in _conversation(role)])
    return text is not None and WORD in text and not any(sign in text for sign in SPILLED)


def _conversation(role: str) -> list[tuple[str, str]]:
    """The shortest that has a message of the role and that templates accept."""
    return {
        "user": [("user", WORD)],
        "system": [("system", WORD), ("user", "hello")],
        "assistant": [("user", "hello"), ("assistant", WORD), ("user", "hello")],
    }[role]


def loops_over_content(tree: nodes.Template) -> bool:
    """Whether a loop runs over a message's content, by itself or through a name, a filter or a slice."""
    names = {"content", *_names_of_content(tree)}
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _names_of_content(tree: nodes.Template) -> Iterator[str]:
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node, {"content"}):
            yield assignment.target.name


def _is_content(expression: nodes.Node | None, names: set[str]) -> bool:
    match expression:
        case nodes.Getattr(attr="content") | nodes.Getitem(arg=nodes.Const(value="content")):
            return True
        case nodes.Name(name=name):
            return name in names
        case nodes.Filter(node=inner) | nodes.Getitem(node=inner, arg=nodes.Slice()):
            return _is_content(inner, names)
    return False
