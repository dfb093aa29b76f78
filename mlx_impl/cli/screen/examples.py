"""The first examples of a file as the model gets them: text, tokens, targets; what was dropped, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from typing import Any

from rich.console import Console
from rich.text import Text

from ...data import Example
from ...text.conversation import Conversation
from ...text.examples import Encoded, encode_each
from ...text.tokenizer import ChatTokenizer
from .console import printable

OPEN, CLOSE = "[[", "]]"  # around targets where there is no colour
NUM_BEFORE = 4  # of the tokens that are shown, how many come before the first target

How = tuple[str, str]  # --targets and --reasoning
Span = tuple[str, bool]  # a text, and whether it is a target


@dataclass(frozen=True)
class Shown:
    """An example and where it comes from."""

    where: str  # "file:line"
    num_tokens: int  # before it was cut
    num_kept: int
    num_targets: int
    first: int  # the number, from 1, of the first token below
    tokens: list[tuple[int, str, bool]]  # id, text, whether it is a target


def first_examples(
    tokenizer: ChatTokenizer,
    conversations: Sequence[Conversation],
    encoded: Encoded,
    how: How,
    count: int,
    num_tokens: int,
) -> list[dict[str, Any]]:
    """A record of each of the first examples, with at most `num_tokens` of its tokens."""
    found = []
    first_kept = islice(kept(conversations, encoded), count)
    for conversation, example in zip(first_kept, encoded.examples, strict=False):
        marks = [False, *example.is_target[1:]]  # the first token is never predicted
        first = max(0, min(marks.index(True) - NUM_BEFORE, len(marks) - num_tokens))
        shown = [
            (token, piece(tokenizer, token), is_target)
            for token, is_target in zip(example.tokens, marks, strict=True)
        ][first : first + num_tokens]
        is_cut = len(example.tokens) == encoded.max_tokens
        whole = whole_example(tokenizer, conversation, how) if is_cut else example
        found.append(
            Shown(conversation.where, len(whole.tokens), len(example.tokens), sum(marks), first + 1, shown)
        )
    return [asdict(shown) for shown in found]


def kept(conversations: Sequence[Conversation], encoded: Encoded) -> Iterator[Conversation]:
    """The conversations of which there is an example, in order."""
    left_out, bad = set(encoded.left_out), [f"{sentence} " for sentence in encoded.bad]
    for conversation in conversations:
        where = conversation.where
        if where not in left_out and not any(sentence.startswith(f"{where}:") for sentence in bad):
            yield conversation


def first_dropped(
    tokenizer: ChatTokenizer,
    conversations: Sequence[Conversation],
    encoded: Encoded,
    bad_rows: Sequence[str],
    how: How,
    count: int,
) -> list[str]:
    """A sentence on each of the first rows that are not trained: unreadable, refused, or without a target."""
    left_out = set(encoded.left_out)
    sentences = [
        f"{c.where}: {why_left_out(whole_example(tokenizer, c, how), encoded.max_tokens)}"
        for c in islice((c for c in conversations if c.where in left_out), count)
    ]
    return [*islice((*bad_rows, *encoded.bad), count), *sentences]


def whole_example(tokenizer: ChatTokenizer, conversation: Conversation, how: How) -> Example:
    return next(encode_each(tokenizer, [conversation], *how))


def why_left_out(example: Example, max_tokens: int) -> str:
    marks = [False, *example.is_target[1:]]
    if not any(marks):
        return f"none of its {len(marks)} tokens is a target"
    first = f"its first target is token {marks.index(True) + 1} of {len(marks)}"
    return f"{first}, beyond the maximum of {max_tokens}"


def piece(tokenizer: ChatTokenizer, token: int) -> str:
    """The text of a token; its name in the vocabulary where it is only a part of a character."""
    text = tokenizer.decode_with_special([token])
    return text if text and "\ufffd" not in text else str(tokenizer.tokenizer.id_to_token(token))


def spans_of(tokenizer: ChatTokenizer, example: Example) -> list[Span]:
    """The example's text, split where targets begin and end. The first token is never a target."""
    marks = zip(example.tokens, (False, *example.is_target[1:]), strict=True)
    runs = groupby(marks, key=lambda mark: mark[1])
    return [
        (tokenizer.decode_with_special([token for token, _ in run]), is_target) for is_target, run in runs
    ]


def print_examples(
    examples: Sequence[Sequence[Span]], shown: Sequence[dict[str, Any]], file: str, console: Console
) -> None:
    is_coloured = console.color_system is not None and not console.no_color
    legend = "targets are green" if is_coloured else f"targets are between {OPEN} and {CLOSE}"
    if examples:
        console.print(f"{file}, the first examples; {legend}")
    for number, spans in enumerate(examples):
        if number < len(shown):
            console.print(headline(shown[number]))
        console.print(marked(spans, is_coloured), end="\n\n")
        if number < len(shown) and shown[number]["tokens"]:
            console.print(token_line(shown[number], is_coloured), end="\n\n")


def headline(shown: dict[str, Any]) -> str:
    kept, whole = shown["num_kept"], shown["num_tokens"]
    tokens = f"{kept} tokens" if kept == whole else f"cut to {kept} of {whole} tokens"
    return f"{printable(shown['where'])}: {tokens}, {shown['num_targets']} of them targets"


def token_line(shown: dict[str, Any], is_coloured: bool) -> Text:
    """Ids and texts; the run of targets is marked."""
    first, last = shown["first"], shown["first"] + len(shown["tokens"]) - 1
    runs = groupby(shown["tokens"], key=lambda token: token[2])
    spans = [(" ".join(f"{token} {text!r}" for token, text, _ in run), mark) for mark, run in runs]
    text = Text(f"tokens {first} to {last}: ")
    for number, span in enumerate(spans):
        text.append(" " if number else "")
        text.append_text(marked([span], is_coloured))
    return text


def marked(spans: Sequence[Span], is_coloured: bool) -> Text:
    text = Text()
    for span, is_target in spans:
        mark = f"{OPEN}{span}{CLOSE}" if is_target and not is_coloured else span
        text.append(printable(mark), "green" if is_target else "dim")
    return text
