"""What runs in the process that renders chat templates: Jinja, in its sandbox. Lines of JSON in and out.

Source: the conventions of Hugging Face's `apply_chat_template`: what a template is given (`messages`,
`tools`, `add_generation_prompt`, special tokens, `raise_exception`, `strftime_now`), `tojson` without HTML
escapes, loop controls, the tag `generation`, several templates by name. A template is somebody else's
program: it reaches nothing outside; how long it may take and how much memory, template_process.py watches.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple
from datetime import datetime
from functools import partial
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .rows import Message, is_text
from .turns import find_turns, require_tools_shown

# Characters of a rendering: so many, and for each byte of the request so many more.
MAX_LENGTH, MAX_TIMES = 2**20, 16
MAX_REASON = 1000  # characters of an error of the template's own
MAX_ANSWERS = 2**20  # characters of several answers together: the rest is asked for again
END = b"0\n"  # after the answers to a line
SIGN = 0.2  # seconds after which an empty line says again that another rendering begins
TO_JSON = json.JSONEncoder(ensure_ascii=False).encode
# Should nobody be there to watch: beyond what the parent allows, the system ends the process.
LAST_SECONDS = 5
LAST_BYTES = 2**31


class GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}, which marks a reply, is what stands in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        tag = next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=tag.lineno)


class Templates:
    """A model's template, or several by name, compiled, and the special tokens that they know."""

    def __init__(self, sources: Mapping[str, str], special_texts: Mapping[str, str], moment: str) -> None:
        extensions = [GenerationTag, "jinja2.ext.loopcontrols"]
        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        sandbox.filters["tojson"] = to_json
        del sandbox.globals["lipsum"]
        now = datetime.fromisoformat(moment).strftime
        sandbox.globals |= {"raise_exception": refuse, "strftime_now": now}
        self.special_texts, self.last_sign, self.most = special_texts, time.monotonic(), MAX_LENGTH
        try:
            self.templates = {name: compiled(sandbox, text) for name, text in sources.items()}
        except Exception as error:  # also of Python, which compiles what Jinja makes
            raise ValueError(f"the chat template cannot be read: {one_line(error)}") from None

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Any] | None
    ) -> str:
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise ValueError(f'the model must have a chat template named "default", got {[*self.templates]}')
        self.begin()
        try:
            text = self.templates[name].render(
                messages=messages,
                tools=tools or None,
                add_generation_prompt=add_generation_prompt,
                **self.special_texts,
            )
            if len(text) > self.most:
                raise jinja2.TemplateError(f"it makes a text longer than {self.most}")
        except Exception as error:  # a template is a program: whatever it does wrong
            raise ValueError(f"the chat template refuses the messages: {one_line(error)}") from None
        if not is_text(text):
            raise ValueError("the chat template must print Unicode, and prints half a surrogate pair")
        return text

    def begin(self) -> None:
        """The bounds are those of one rendering, so the parent is told of it, but not a thousand times."""
        if time.monotonic() - self.last_sign > SIGN:
            self.last_sign = time.monotonic()
            signal.setitimer(signal.ITIMER_PROF, LAST_SECONDS)
            say(b"\n")

    def shown(self, messages: Sequence[Message], tools: Sequence[Any] | None, every: bool) -> list[Any]:
        """The rendering, and where the replies stand in it."""
        whole = self.render(messages, False, tools)
        require_tools_shown(self.render, whole, messages, tools)
        turns = find_turns(partial(self.render, tools=tools), whole, messages, every)
        return [whole, [astuple(turn) for turn in turns]]


def compiled(sandbox: jinja2.Environment, source: str) -> jinja2.Template:
    template = sandbox.from_string(source)
    template.globals = {**template.globals}  # a ChainMap, which Jinja would copy at each rendering
    return template


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def one_line(error: Exception) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]} ..."


def to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    """Jinja's own filter escapes for HTML, and sorts."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def result_of(function: Callable[..., Any], **given: Any) -> Any:
    """What it returns, or an object with the sentence of its ValueError."""
    try:
        return function(**given)
    except ValueError as error:
        return {"refused": str(error)}


def to_line(value: Any) -> bytes:
    return TO_JSON(value).encode("utf-8", "replace") + b"\n"


def answers(templates: Templates, request: dict[str, Any]) -> Iterator[bytes]:
    """To messages a text; to rows a line each, but the parent need not hold many long ones at a time."""
    if "rows" not in request:
        yield to_line(result_of(templates.render, **request)) + END
        return
    length = 0
    for messages, tools in request["rows"]:
        line = to_line(result_of(templates.shown, messages=messages, tools=tools, every=request["every"]))
        yield line
        length += len(line)
        if length > MAX_ANSWERS:
            break
    yield END


def serve() -> None:
    """A line has templates, the first one too, or asks for renderings; until the parent closes the pipe."""
    limit_itself()
    templates: Any = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if "sources" in request:
            templates = None  # free those before
            templates = result_of(Templates, **request)
            say(to_line(None if isinstance(templates, Templates) else templates) + END)
            continue
        templates.most = MAX_LENGTH + MAX_TIMES * len(line)
        for answer in answers(templates, request):
            say(answer)


def say(line: bytes) -> None:
    sent = os.write(1, line)
    while sent < len(line):
        sent += os.write(1, line[sent : sent + 2**16])


def limit_itself() -> None:
    """Where the system knows such limits; the timer starts anew as long as renderings end."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process, wherever it is
    signal.setitimer(signal.ITIMER_PROF, LAST_SECONDS)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = LAST_BYTES if hard == resource.RLIM_INFINITY else min(LAST_BYTES, hard)
    with suppress(ValueError, OSError):  # macOS
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
