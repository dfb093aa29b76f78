"""Chat templates: render messages to the text that the model reads, in a separate process.

A template is a program written by somebody else. template_worker.py runs it in Jinja's sandbox;
template_process.py starts that worker process and ends it when it takes too much time or memory.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from .conversation import Message
from .messages import without_nulls
from .template_process import acquire_process, release_process
from .turns import Turn

Tools = Sequence[dict[str, Any]] | None
# messages, tools, the messages to find (from 0), and those whose reasoning must be shown
Row = tuple[Sequence[Message], Tools, Sequence[int], Sequence[int]]
Rendered = tuple[str, list[Turn]]  # the text, and where the messages to find are in it

MAX_BATCH_ROWS, MAX_BATCH_BYTES = 64, 2**16  # of rows sent to the worker in one request


class ChatTemplate:
    """A model's template, or several by name, with the special tokens that they print."""

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        sources = {"default": source} if isinstance(source, str) else source
        if not sources:
            raise ValueError("the chat template must be a text, or several with names, got none")
        setup = {
            "sources": {**sources},
            "special_tokens": {**special_tokens},
            "now": current_time().isoformat(),
        }
        self.process = acquire_process(to_json(setup) + b"\n")
        weakref.finalize(self, release_process, self.process)
        unwrap(self.process.setup_answers[0])

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Tools = None,
    ) -> str:
        """The text that the model reads; ValueError if the template fails or exceeds a limit."""
        shown = plain_messages(messages)
        request = {"messages": shown, "add_generation_prompt": add_generation_prompt, "tools": tools}
        return unwrap(self.process.ask(to_json(request) + b"\n")[0])

    def render_with_turns(self, rows: Iterable[Row]) -> Generator[Rendered | ValueError]:
        """For each row, its text and turns, or the ValueError that the template or the row is to blame for.

        Raises ValueError, after the results of all rows before it, where no further row can be rendered. One
        batch of rows is rendered ahead, in a thread that waits for the worker.
        """
        batch: list[bytes] = []
        rest = json_batches(rows)

        def ask() -> list[Any]:
            nonlocal batch
            batch = batch or next(rest, [])
            request = b'{"rows": [%s]}\n' % b", ".join(batch)
            answers = self.process.ask(request) if batch else []
            batch = batch[len(answers) :]  # the worker may answer only some of the rows
            return answers

        with ThreadPoolExecutor(1) as thread:
            pending = thread.submit(ask)
            while answers := pending.result():
                pending = thread.submit(ask)
                for answer in answers:
                    if isinstance(answer, dict):
                        yield ValueError(answer["error"])
                    else:
                        yield answer[0], [Turn(*turn) for turn in answer[1]]


def json_batches(rows: Iterable[Sequence[Any]]) -> Iterator[list[bytes]]:
    """Rows as JSON, in batches. A row that raises does so only after the rows before it are out."""
    batch: list[bytes] = []
    try:
        for row in rows:
            batch.append(to_json(row))
            if len(batch) == MAX_BATCH_ROWS or sum(map(len, batch)) > MAX_BATCH_BYTES:
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
        raise ValueError(f"the messages must be values that JSON can hold: {error}") from None


def plain_messages(messages: Sequence[Message]) -> Any:
    """The messages without null values: None reaches no template."""
    try:
        return without_nulls([*messages])
    except RecursionError as error:
        raise ValueError(f"the messages must be values that JSON can hold: {error}") from None


def unwrap(answer: Any) -> Any:
    """The worker's answer; ValueError if it is an error message."""
    if isinstance(answer, dict):
        raise ValueError(answer["error"])
    return answer


def current_time() -> datetime:
    """What `strftime_now` prints in every rendering of one template; SOURCE_DATE_EPOCH overrides it."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(fixed), UTC) if fixed.isdecimal() else datetime.now()
