"""What `train` asks where the data names no answers, and how long an answer may be."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from ...text.conversation import Conversation
from ...text.examples import encode_each
from ...text.tokenizer import ChatTokenizer
from .answers import MIN_TOKENS, askable, prompts_of, reply_text

NUM_SAMPLES, CANDIDATES = 3, 12  # rows that are shown, and rows from which they are chosen
MAX_SAMPLE_TOKENS = 120  # of a sample, which is only shown
NUM_LONGEST = 8  # replies of most characters, of which the one of most tokens is looked for
MAX_START = 200  # characters of a plain text that the model goes on with
Row = TypeVar("Row")


def choose_samples(
    tokenizer: ChatTokenizer, conversations: Sequence[Conversation], max_prompt_tokens: int
) -> list[Conversation]:
    """At most NUM_SAMPLES rows, evenly spaced, whose last reply the model can be asked for."""
    rows = [question_of(row) for row in evenly_spaced(conversations, CANDIDATES)]
    kept, _ = askable(tokenizer, {"sample": [row for row in rows if row is not None]})
    usable = kept.get("sample", [])
    lengths = map(len, prompts_of(tokenizer, usable))
    short = [c for c, length in zip(usable, lengths, strict=True) if 0 < length <= max_prompt_tokens]
    return list(evenly_spaced(short, NUM_SAMPLES))


def evenly_spaced(rows: Sequence[Row], most: int) -> Sequence[Row]:
    """At most `most` of the rows or examples, evenly spaced; all of them for -1."""
    if most == -1 or len(rows) <= most:
        return rows
    return [rows[i * len(rows) // most] for i in range(most)]


def question_of(row: Conversation) -> Conversation | None:
    """The row as a question, of a plain text its start and its rest; None where there is nothing to ask."""
    if row.text is None:
        return row if len(row.messages) > 1 else None
    middle = min(MAX_START, len(row.text) // 2)
    space = row.text.rfind(" ", 1, middle + 1)
    start, rest = row.text[:space], row.text[space:]
    if space < 1 or not start.strip():
        return None
    turns = {"role": "user", "content": start}, {"role": "assistant", "content": rest}
    return replace(row, messages=turns, text=start)


def longest_reply(tokenizer: ChatTokenizer, conversations: Sequence[Conversation], reasoning: str) -> int:
    """The tokens of the longest last reply, its end included; 0 where there are no replies."""
    with_reply = [c for c in conversations if c.messages]
    longest = heapq.nlargest(NUM_LONGEST, with_reply, key=lambda c: len(reply_text(c)))
    return max((reply_tokens(tokenizer, c, reasoning) for c in longest), default=0)


def reply_tokens(tokenizer: ChatTokenizer, conversation: Conversation, reasoning: str) -> int:
    plain = replace(conversation, untrained=frozenset())
    try:
        (example,) = encode_each(tokenizer, [plain], "completion", reasoning)
        return sum(example.is_target)
    except ValueError:  # the chat template refuses the row
        return len(tokenizer.encode(reply_text(conversation))) + 1


def max_answer_tokens(longest: int, are_samples: bool) -> int:
    """As many as the longest reply of the data needs, and some where replies are short."""
    tokens = max(MIN_TOKENS, longest)
    return min(tokens, MAX_SAMPLE_TOKENS) if are_samples else tokens
