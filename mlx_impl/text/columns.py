"""Rows to conversations: which format a row has, by the names of its columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..disk.files import one_line
from .conversation import Conversation
from .formats import FORMATS, Format, Row
from .messages import without_nulls

NEEDED = {name for f in FORMATS for name in f.required}
NAMES = tuple(dict.fromkeys(name for f in FORMATS for name in (*f.required, *f.optional, *f.shared)))
# What other data sets call them, the likeliest first; only for advice.
PROMPTS = (
    *("prompt", "question", "query", "input", "user", "human", "problem", "source", "context", "instruction"),
)
COMPLETIONS = (
    *("completion", "response", "answer", "output", "reply", "assistant", "bot", "solution", "target"),
    "chosen",
)
TEXTS = ("content", "body", "document", "passage", "story")
REFUSED = {
    "chat_template_kwargs": "arguments of the chat template are not supported",
    "functions": 'write "tools" instead',
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "only texts can be read"),
}


def parse_columns(text: str) -> dict[str, str]:
    """{"prompt": "question"} from "prompt=question"; ValueError for another form or an unknown name."""
    pairs = [part.partition("=") for part in text.split(",")]
    columns = {name.strip(): source.strip() for name, _, source in pairs}
    if len(columns) < len(pairs) or not all(columns) or not all(columns.values()):
        raise ValueError(f"--columns must be NAME=COLUMN,NAME=COLUMN,... with different names, got {text!r}")
    for name in columns:
        if name not in NAMES:
            raise ValueError(f"--columns must name one of {', '.join(NAMES)}, got {name!r}")
    return columns


def to_conversation(value: Any, where: str, columns: Mapping[str, str]) -> tuple[Conversation, set[str]]:
    """The conversation in a row, and the row's columns that are not used; ValueError, without the place."""
    if not isinstance(value, dict):
        raise ValueError(f"a row must be an object, got {type(value).__name__}")
    row = without_nulls(value)
    if columns:
        row = renamed(row, value, columns)
    kind = find_format(row, value, columns)
    unused = {name for name in row if name not in (*kind.required, *kind.optional, *kind.shared)}
    for name in unused & REFUSED.keys():
        if row[name]:
            raise ValueError(f'"{name}" must not be there: {REFUSED[name]}')
    found = kind.read({name: row[name] for name in row if name not in unused}, where)
    shadowed = {name for name in columns if name in value and name not in columns.values()}
    return found, unused | shadowed


def renamed(row: Row, whole: Row, columns: Mapping[str, str]) -> Row:
    """The row under our names; ValueError where a column that its format needs is not there."""
    for name, source in columns.items():
        if name in NEEDED and source not in whole:
            raise ValueError(f'--columns names "{source}", and the row has {listed(whole)}')
    others = {name: row[name] for name in row if name not in {*columns, *columns.values()}}
    return others | {name: row[source] for name, source in columns.items() if source in row}


def find_format(row: Row, whole: Row, columns: Mapping[str, str]) -> Format:
    """The one format whose columns the row has; where `columns` names those of a format, that format."""
    found = [f for f in FORMATS if all(name in row for name in f.required)]
    if columns:
        named = [f for f in FORMATS if not columns.keys().isdisjoint((*f.required, *f.optional))]
        found = [f for f in found if f in named] if named else found
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(f'"{f.required[0]}"' for f in found)
        first = found[0].required[0]
        raise ValueError(f"a row must have one format, got {names}: choose one, as --columns {first}={first}")
    raise ValueError(without_format(row, whole))


def without_format(row: Row, whole: Row) -> str:
    """The sentence for a row of no known format: what it has, and the flag that would read it."""
    formats = ", ".join(" and ".join(f'"{name}"' for name in f.required) for f in FORMATS)
    nulls = [name for name in whole if name not in row]
    null = f", and null in {listed(nulls)}" if nulls else ""
    advice = advised_columns(row)
    flag = f": try --columns {advice}" if advice else ", and --columns can rename"
    return f"a row must have {formats}, got {listed(row)}{null}{flag}"


def advised_columns(row: Row) -> str:
    """The value of --columns that would read the row, or an empty text."""
    row = {name: value for name, value in row.items() if is_plain(name)}
    if chats := [name for name, value in row.items() if is_chat(value)]:
        return f"messages={chats[0]}"
    texts = {name.lower(): name for name, value in row.items() if isinstance(value, str)}

    def first(names: Sequence[str], but: str | None = None) -> str | None:
        return next((texts[name] for name in names if name in texts and texts[name] != but), None)

    completion = first(COMPLETIONS)
    if completion and (instruction := first(["instruction"])):
        more = first(["input", "context"])
        return f"instruction={instruction},output={completion}" + (f",input={more}" if more else "")
    if completion and (prompt := first(PROMPTS, completion)):
        return f"prompt={prompt},completion={completion}"
    text = first(TEXTS)
    return f"text={text}" if text else ""


def is_plain(name: str) -> bool:
    """Whether --columns can name it."""
    return name.isprintable() and name == name.strip() and "," not in name


def is_chat(value: Any) -> bool:
    """Whether it looks like a list of messages."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and not {"role", "from"}.isdisjoint(first)


def listed(names: Iterable[str]) -> str:
    return one_line(", ".join(f'"{name}"' for name in names) or "nothing")
