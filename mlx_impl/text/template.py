"""Chat templates: messages -> the text that the model reads, rendered in a process of their own.

A template is somebody else's program. What it is offered, and the sandbox that it runs in, are in
template_worker.py; that it ends and how much memory it may take, in template_process.py.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from .rows import Message
from .template_process import give_back, watched_process
from .turns import Turn

Row = tuple[Sequence[Message], Sequence[dict[str, Any]] | None]  # messages, tools

MAX_ROWS, MAX_BYTES = 64, 2**16  # that are asked for at a time


class ChatTemplate:
    """A model's template, or several by name, and the special tokens that they know."""

    def __init__(self, source: str | Mapping[str, str], special_texts: Mapping[str, str]) -> None:
        sources = {"default": source} if isinstance(source, str) else source
        if not sources:
            raise ValueError("the chat template must be a text, or several with names, and is empty")
        given = {"sources": {**sources}, "special_texts": {**special_texts}, "moment": now().isoformat()}
        self.process = watched_process(to_json(given) + b"\n")
        weakref.finalize(self, give_back, self.process)
        text_of(self.process.opening[0])

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> str:
        """The text that the model reads; ValueError when the template refuses the messages."""
        request = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": tools}
        return text_of(self.process.ask(to_json(request) + b"\n")[0])

    def render_with_turns(self, rows: Iterable[Row], every: bool) -> Iterator[tuple[str, list[Turn]]]:
        """Of each row the text, and its last reply or every one.

        ValueError, where its turn comes, for a row that the template refuses or does not show. Many rows are
        asked for at a time, in a thread: it waits, and watches, while this one works on those before.
        """
        batch: list[bytes] = []
        rest = batches(rows)

        def ask() -> list[Any]:
            nonlocal batch
            batch = batch or next(rest, [])
            request = b'{"every": %s, "rows": [%s]}\n' % (to_json(every), b", ".join(batch))
            answers = self.process.ask(request) if batch else []
            batch = batch[len(answers) :]
            return answers

        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(ask)
            while answers := asked.result():
                asked = thread.submit(ask)
                for text, turns in map(text_of, answers):
                    yield text, [Turn(*turn) for turn in turns]


def batches(rows: Iterable[Row]) -> Iterator[list[bytes]]:
    """As JSON. Those before a row that is none come first, so that it is named in its turn."""
    batch: list[bytes] = []
    try:
        for messages, tools in rows:
            batch.append(to_json([messages, tools]))
            if len(batch) == MAX_ROWS or sum(map(len, batch)) > MAX_BYTES:
                yield batch
                batch = []
    except ValueError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def to_json(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the messages must be what JSON can say: {error}") from None


def text_of(answer: Any) -> Any:
    """The answer, or as an error what it refuses."""
    if isinstance(answer, dict):
        raise ValueError(answer["refused"])
    return answer


def now() -> datetime:
    """One moment for all renderings of a template; where SOURCE_DATE_EPOCH is set, that one."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(fixed), UTC) if fixed.isdecimal() else datetime.now()
