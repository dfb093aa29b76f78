"""The program of the worker process: renders chat templates in Jinja's sandbox, lines of JSON in and out.

Source: the conventions of Hugging Face's `apply_chat_template`. A template gets `messages`, `tools`,
`add_generation_prompt`, the special tokens, `raise_exception` and `strftime_now`; `tojson` does not escape
for HTML; loop controls and the tag `generation` work; there may be several templates by name. The sandbox
keeps a template from the rest of the system; template_process.py limits its time and memory.
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

from ..disk.files import one_line
from .conversation import Message, is_text
from .shown import require_reasoning_shown, require_tools_shown
from .tool_calls import with_empty_content, with_text_arguments
from .turn_probe import find_all_turns

# A rendering may have MIN_LENGTH_LIMIT characters, plus LENGTH_PER_BYTE for each byte of its request.
MIN_LENGTH_LIMIT, LENGTH_PER_BYTE = 2**20, 16
MAX_ANSWERS_LENGTH = 2**20  # characters of the answers to one request; the parent asks again for the rest
END = b"0\n"  # ends the answers to a request
HEARTBEAT_SECONDS = 0.2  # at most so often an empty line tells the parent that a new rendering begins
TO_JSON = json.JSONEncoder(ensure_ascii=False).encode
# Limits that the system enforces, above the parent's own: they hold even if the parent has died.
HARD_CPU_SECONDS = 5
HARD_BYTES = 2**31


class GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %} marks a reply for other programs; here it does nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        tag = next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=tag.lineno)


class Templates:
    """A model's template, or several by name, compiled, with the special tokens that they print."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], now: str) -> None:
        extensions = [GenerationTag, "jinja2.ext.loopcontrols"]
        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        sandbox.filters["tojson"] = to_json
        del sandbox.globals["lipsum"]
        strftime = datetime.fromisoformat(now).strftime
        sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": strftime}
        self.special_tokens, self.last_heartbeat = special_tokens, time.monotonic()
        self.max_length = MIN_LENGTH_LIMIT
        try:
            self.templates = {name: compile_template(sandbox, text) for name, text in sources.items()}
        except Exception as error:  # Jinja's errors, and Python's when it compiles Jinja's output
            raise ValueError(f"the chat template cannot be read: {one_line(error)}") from None

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Any] | None
    ) -> str:
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise ValueError(f'the model must have a chat template named "default", got {[*self.templates]}')
        self.send_heartbeat()
        try:
            text = self.render_by(self.templates[name], messages, add_generation_prompt, tools or None)
            if len(text) > self.max_length:
                raise jinja2.TemplateError(f"it makes a text longer than {self.max_length}")
        except Exception as error:  # a template is a program, which can raise anything
            raise ValueError(f"the chat template refuses the messages: {one_line(error)}") from None
        if not is_text(text):
            raise ValueError("the chat template must print valid Unicode, got half a surrogate pair")
        return text

    def render_by(self, template: jinja2.Template, messages: Sequence[Message], *more: Any) -> str:
        """The text; where a template fails, with a content beside tool calls, or their arguments as texts."""
        add_generation_prompt, tools = more
        values = {"tools": tools, "add_generation_prompt": add_generation_prompt, **self.special_tokens}
        try:
            return template.render(messages=messages, **values)
        except Exception:
            filled = with_empty_content(messages)
            for others in (filled, with_text_arguments(messages), with_text_arguments(filled)):
                with suppress(Exception):  # the first error is the one to report
                    if others != messages:
                        return template.render(messages=others, **values)
            raise

    def send_heartbeat(self) -> None:
        """Restart the time limits, which are limits of one rendering, here and in the parent."""
        if time.monotonic() - self.last_heartbeat > HEARTBEAT_SECONDS:
            self.last_heartbeat = time.monotonic()
            signal.setitimer(signal.ITIMER_PROF, HARD_CPU_SECONDS)
            write_all(b"\n")

    def render_with_turns(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        chosen: Sequence[int],
        with_reasoning: Sequence[int],
    ) -> list[Any]:
        """The text, and where the chosen messages are in it; some must be shown with their reasoning."""
        whole = self.render(messages, False, tools)
        require_tools_shown(self.render, whole, messages, tools)
        require_reasoning_shown(self.render, whole, messages, tools, with_reasoning)
        turns = find_all_turns(partial(self.render, tools=tools), whole, messages, chosen)
        return [whole, [astuple(turn) for turn in turns]]


def compile_template(sandbox: jinja2.Environment, source: str) -> jinja2.Template:
    template = sandbox.from_string(source)
    template.globals = {**template.globals}  # Jinja would copy its ChainMap at every rendering
    return template


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """The filter `tojson`: Jinja's own escapes for HTML and sorts the keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def result_of(function: Callable[..., Any], **arguments: Any) -> Any:
    """What the function returns, or {"error": message} for its ValueError."""
    try:
        return function(**arguments)
    except ValueError as error:
        return {"error": str(error)}


def to_line(value: Any) -> bytes:
    return TO_JSON(value).encode("utf-8", "replace") + b"\n"


def answers(templates: Templates, request: dict[str, Any]) -> Iterator[bytes]:
    """One line for one list of messages; for rows a line each, until they are long enough together."""
    if "rows" not in request:
        yield to_line(result_of(templates.render, **request)) + END
        return
    length = 0
    for row in request["rows"]:
        line = to_line(result_of(partial(templates.render_with_turns, *row)))
        yield line
        length += len(line)
        if length > MAX_ANSWERS_LENGTH:
            break
    yield END


def serve() -> None:
    """Answer requests until the parent closes the pipe; the first sets the templates, later ones may too."""
    set_hard_limits()
    templates: Any = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if "sources" in request:
            templates = None  # free the old ones first
            templates = result_of(Templates, **request)
            write_all(to_line(None if isinstance(templates, Templates) else templates) + END)
            continue
        templates.max_length = MIN_LENGTH_LIMIT + LENGTH_PER_BYTE * len(line)
        for answer in answers(templates, request):
            write_all(answer)


def write_all(line: bytes) -> None:
    sent = os.write(1, line)
    while sent < len(line):
        sent += os.write(1, line[sent : sent + 2**16])


def set_hard_limits() -> None:
    """SIGPROF ends the process after HARD_CPU_SECONDS without a heartbeat; Linux also limits its memory."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, HARD_CPU_SECONDS)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = HARD_BYTES if hard == resource.RLIM_INFINITY else min(HARD_BYTES, hard)
    with suppress(ValueError, OSError):  # macOS
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
