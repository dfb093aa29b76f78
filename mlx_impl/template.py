"""Chat templates: messages -> the text that the model reads, rendered in a sandbox.

Source: the conventions of Hugging Face's `apply_chat_template`: what a template is given (`messages`,
`tools`, `add_generation_prompt`, special tokens, `raise_exception`, `strftime_now`), `tojson` without HTML
escapes, loop controls, the tag `generation`, several templates by name. A template is somebody else's
program: it reaches nothing outside, and its steps are counted, so that it ends; how
long what it makes may be, and what of it is not bounded, says template_limits.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .rows import Message, is_text
from .template_limits import FILTERS, bounded, bounded_method, concatenated, operate

MAX_STEPS = 1_000_000  # rounds of loops and calls of one rendering, about a second


class GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}, which marks a reply, is what stands in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        tag = next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=tag.lineno)


class CountedSandbox(ImmutableSandboxedEnvironment):
    """A sandbox that stops a program after a number of steps: nested loops and macros end too."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})
    concat = staticmethod(concatenated)

    def __init__(self) -> None:
        extensions = [GenerationTag, "jinja2.ext.loopcontrols"]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.steps = 0
        self.filters |= {"tojson": to_json}
        self.filters |= {name: bounded(length, self.filters[name]) for name, length in FILTERS.items()}
        self.filters |= {"counted": self.counted, "concatenated": concatenated}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": refuse, "strftime_now": now().strftime}

    def compile_counted(self, source: str) -> jinja2.Template:
        tree = self.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        for concat in tree.find_all(nodes.Concat):
            parts = nodes.List(concat.nodes, lineno=concat.lineno)
            concat.nodes = [nodes.Filter(parts, "concatenated", [], [], None, None, lineno=concat.lineno)]
        return self.from_string(tree)

    def spend(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise jinja2.TemplateError(f"it takes more than {MAX_STEPS} steps")

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.spend()
            yield item

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.spend()
        return super().call(context, bounded_method(function), *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        return operate(operator, left, right)


class ChatTemplate:
    """A model's template, or several by name, and the special tokens that they know."""

    def __init__(self, source: str | Mapping[str, str], special_texts: Mapping[str, str]) -> None:
        sources = {"default": source} if isinstance(source, str) else source
        if not sources:
            raise ValueError("the chat template must be a text, or several with names, and is empty")
        self.sandbox, self.special_texts = CountedSandbox(), special_texts
        try:
            self.templates = {name: self.sandbox.compile_counted(text) for name, text in sources.items()}
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"the chat template cannot be read: {one_line(error)}") from None

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> str:
        """The text that the model reads; ValueError when the template refuses the messages."""
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise ValueError(f'the model must have a chat template named "default", got {[*self.templates]}')
        self.sandbox.steps = 0
        try:
            text = self.templates[name].render(
                messages=list(messages),
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                **self.special_texts,
            )
        except Exception as error:  # a template is a program: whatever it does wrong
            raise ValueError(f"the chat template refuses the messages: {one_line(error)}") from None
        if not is_text(text):
            raise ValueError("the chat template must print Unicode, and prints half a surrogate pair")
        return text


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def now() -> datetime:
    """One moment for all renderings of a template; where SOURCE_DATE_EPOCH is set, that one."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(fixed), UTC) if fixed.isdecimal() else datetime.now()


def to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    """Jinja's own filter escapes for HTML, and sorts."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)
