"""Find all replies of a long conversation with a few renderings, instead of a few for each reply.

The conversation is rendered once with a mark of its own in place of every message's content. What is between
two marks is the template's; it is found again in the real text, one after the other. How far before a reply
its prompt ends is found by rendering some of the prompts, the first, the second, the fourth and so on, and
the last, of all replies that the template introduces with the same text. Where anything differs from what is
expected, `find_turns` looks for each reply alone; so the result is the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise

from .conversation import Message
from .shown_at_once import free_marks
from .turns import Render, Turn, find_turns, message_span, prompt_length

MIN_TOGETHER = 3  # replies; fewer are as quick one by one
Spans = list[tuple[int, int]]  # of every message, in the rendered text


def find_all_turns(
    render: Render, whole: str, messages: Sequence[Message], chosen: Sequence[int]
) -> list[Turn]:
    """As `find_turns`, in a time that grows with the conversation and not with its square."""
    together = find_together(render, whole, messages, chosen) if len(chosen) >= MIN_TOGETHER else None
    return find_turns(render, whole, messages, chosen) if together is None else together


def find_together(
    render: Render, whole: str, messages: Sequence[Message], chosen: Sequence[int]
) -> list[Turn] | None:
    """None where the template does not show every message once, in its place."""
    parts = static_parts(render, whole, messages)
    spans = None if parts is None else align(render, whole, messages, parts)
    if parts is None or spans is None:
        return None
    starts: dict[int, int] = {}
    for group in groups_of(parts, messages, chosen):
        if any(message_span(render, whole, messages, i) != spans[i] for i in {group[0], group[-1]}):
            return None
        starts |= reply_starts(render, whole, messages, spans, group)
    next_starts = [start for start, _ in spans[1:]] + [len(whole)]
    if any(spans[i][1] > next_starts[i] for i in chosen):
        return None
    return [Turn(starts[i], spans[i][1], next_starts[i]) for i in chosen]


def static_parts(render: Render, whole: str, messages: Sequence[Message]) -> list[str] | None:
    """The template's own text before, between and after the messages."""
    marks = list(islice(free_marks(whole), len(messages)))
    for is_kept in (False, True):  # without tool calls, else with them
        probe = [with_mark(m, mark, is_kept) for m, mark in zip(messages, marks, strict=False)]
        try:
            text = render(probe, False)
        except ValueError:
            continue
        places = [text.find(mark) for mark in marks]
        if len(marks) < len(messages) or min(places) < 0 or places != sorted(places):
            continue
        if sum(character in marks for character in text) == len(marks):
            ends = [-1, *places, len(text)]
            return [text[a + 1 : b] for a, b in pairwise(ends)]
    return None


def with_mark(message: Message, mark: str, is_kept: bool) -> Message:
    kept = message if is_kept or message["role"] != "assistant" else {"role": message["role"]}
    return {**kept, "content": mark}


def align(render: Render, whole: str, messages: Sequence[Message], parts: Sequence[str]) -> Spans | None:
    """Where each message is, if the text is the static parts with a message after each but the last."""
    spans: Spans = []
    at = len(parts[0])
    if not whole.startswith(parts[0]) or not whole.endswith(parts[-1]):
        return None
    for i, message in enumerate(messages):
        end = end_of(whole, at, message, parts[i + 1])
        if i == len(messages) - 1:
            end = len(whole) - len(parts[-1])
        elif end is None:
            end = end_by_next(whole, at, messages[i + 1], parts[i + 1 : i + 3])
        if end is None and (span := message_span(render, whole, messages, i)):
            end = span[1]
        if end is None or end < at or not whole.startswith(parts[i + 1], end):
            return None
        spans.append((at, end))
        at = end + len(parts[i + 1])
    return spans if at == len(whole) else None


def end_of(whole: str, at: int, message: Message, after: str) -> int | None:
    """Where the message's content ends, if it is there as it is, or stripped, and the next part follows."""
    content = message.get("content")
    if message.get("tool_calls") or not isinstance(content, str):
        return None
    for text in (content, content.lstrip(), content.rstrip(), content.strip()):
        if whole.startswith(text, at) and whole.startswith(after, at + len(text)):
            return at + len(text)
    return None


def end_by_next(whole: str, at: int, following: Message, parts: Sequence[str]) -> int | None:
    """Where the next part begins, if it is there once with the following message and the part after that."""
    content = following.get("content")
    text = content.strip() if isinstance(content, str) else ""
    needle = parts[0] + text + parts[1]
    return whole.find(needle, at) if text and whole.count(needle, at) == 1 else None


def groups_of(
    parts: Sequence[str], messages: Sequence[Message], chosen: Sequence[int]
) -> Iterator[list[int]]:
    """The chosen messages that the template introduces in the same way, each group in order."""
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i in chosen:
        before = messages[i - 1] if i else {}
        keys = tuple(key for message in (before, messages[i]) for key in sorted(message))
        groups[(parts[i], before.get("role"), messages[i]["role"], *keys, i == len(messages) - 1)].append(i)
    yield from groups.values()


def reply_starts(
    render: Render, whole: str, messages: Sequence[Message], spans: Spans, group: Sequence[int]
) -> dict[int, int]:
    """Where the replies of a group start: the end of the prompt, if the text begins with the prompt."""

    def before(i: int) -> int | None:
        length = prompt_length(render, whole, messages[:i])
        return None if length is None else spans[i][0] - length

    sampled = {group[n] for n in (*doubled(len(group)), len(group) - 1)}
    found = {before(i) for i in sampled}
    if len(found) == 1:
        distance = found.pop() or 0
        return {i: spans[i][0] - distance for i in group}
    return {i: spans[i][0] - (before(i) or 0) for i in group}


def doubled(count: int) -> Iterator[int]:
    n = 1
    while n <= count:
        yield n - 1
        n *= 2
