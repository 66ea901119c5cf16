"""A model's chat template: found where the hub ships it, rendered in a sandbox as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from disagg.api.text.content_format import Message, find_format
from disagg.engine.model.weights import ModelRefused, read_json

OTHER_FILES: Final[tuple[type[nodes.Node], ...]] = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class TemplateError(Exception):
    """The template does not take this conversation; the message is the template's own."""


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here it is its contents."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def find_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja`, else the entry of the tokenizer's config, else the processor's `chat_template.json`."""
    file = folder / "chat_template.jinja"
    try:
        if file.is_file():
            return file.read_text("utf-8-sig")  # a byte order mark is no part of a prompt
    except (OSError, UnicodeDecodeError) as exc:
        raise ModelRefused(f"the chat template `{file}` cannot be read as UTF-8 text: {exc}") from exc
    if entry := tokenizer_config.get("chat_template"):
        return _default_of(entry)
    return _default_of((read_json(folder, "chat_template.json") or {}).get("chat_template"))


def _default_of(entry: Any) -> str | None:
    """Old configs list several named templates. Raises ModelRefused for what is neither text nor such a list."""
    if entry is None or isinstance(entry, str):
        return entry
    try:
        template = {item["name"]: item["template"] for item in entry}.get("default")
    except (TypeError, KeyError) as exc:
        raise ModelRefused(f"the model's chat template is neither text nor a list of named ones: {exc!r}") from exc
    if not isinstance(template, str | None):
        raise ModelRefused(f"the model's default chat template is a {type(template).__name__}, expected text")
    return template


class ChatTemplate:
    """Renders conversations. `variables` are the special tokens (`bos_token`, ...) that templates name.

    Raises ModelRefused when the source is not a template.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(  # what a model folder ships is data, not trusted code
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except jinja2.TemplateSyntaxError as exc:
            raise ModelRefused(f"the model's chat template is not valid: line {exc.lineno}: {exc.message}") from exc
        except (SyntaxError, RecursionError, ValueError) as exc:  # of the Python that jinja makes of it
            raise ModelRefused(f"the model's chat template is not valid: {exc}") from exc
        if any(tree.find(kind) is not None for kind in OTHER_FILES):
            raise ModelRefused("the model's chat template asks for other files, which a chat template does not have")
        self._variables = dict(variables)
        self._format = find_format(tree, self._try)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text. Raises TemplateError in the template's own words."""
        messages = [self._format.apply(message) for message in messages]
        return self._render(messages, {**(arguments or {}), "add_generation_prompt": add_generation_prompt})

    def _render(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> str:
        try:
            return self._template.render(
                {**self._variables, "tools": None, "documents": None, **arguments, "messages": messages}
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as exc:
            raise TemplateError(str(exc) or type(exc).__name__) from exc
        except RecursionError as exc:
            raise TemplateError("the values are nested too deeply") from exc

    def _try(self, messages: Sequence[Message]) -> str | None:
        try:
            return self._render(messages, {"add_generation_prompt": True})
        except TemplateError:
            return None


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # the server's local time, as transformers gives it


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
