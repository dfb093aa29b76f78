"""Read data files into conversations, and say what was left out. Imports the standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..disk.files import one_line
from .columns import to_conversation
from .conversation import Conversation
from .data_files import raw_rows
from .messages import KNOWN_KEYS
from .reasoning import with_inline_reasoning

MAX_LISTED = 5  # rows of a data file that one remark names


@dataclass(frozen=True)
class Reading:
    """How data files are read."""

    columns: Mapping[str, str] = field(default_factory=dict)  # our name of a column: the file's name
    skip_bad: bool = False  # leave out rows that cannot be read, instead of raising ValueError
    inline_reasoning: bool = False  # write a reply's reasoning into its text, between <think> and </think>


@dataclass
class DataFile:
    """The conversations of a file or of its shards, and what of it is not used."""

    conversations: list[Conversation] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)  # the sentence of each row that was left out
    unused: dict[str, None] = field(default_factory=dict)  # columns that mean nothing here
    unknown: dict[str, None] = field(default_factory=dict)  # keys of messages that only a template may know
    columns: set[str] = field(default_factory=set)  # all that a row has
    notes: list[str] = field(default_factory=list)  # on the file itself

    def remarks(self, kind: str) -> list[str]:
        """One sentence on each: bad rows, columns and keys. `kind`: "training", say."""
        total = len(self.bad) + len(self.conversations)
        remarks = [*self.notes, *bad_rows_remark(self.bad, total, kind)]
        if self.unused:
            remarks.append(
                f"columns of the {kind} data that are not used: {one_line(', '.join(self.unused))}"
            )
        if self.unknown:
            keys = one_line(", ".join(self.unknown))
            remarks.append(f"keys in messages of the {kind} data that only a chat template may use: {keys}")
        return remarks


def bad_rows_remark(bad: Sequence[str], total: int, kind: str) -> list[str]:
    if not bad:
        return []
    verb = "was" if len(bad) == 1 else "were"
    more = f"; and {len(bad) - MAX_LISTED} more" if len(bad) > MAX_LISTED else ""
    return [f"{len(bad)} of {total} {kind} rows {verb} skipped: {'; '.join(bad[:MAX_LISTED])}{more}"]


def read_conversations(path: Path, reading: Reading | None = None) -> list[Conversation]:
    """The conversations of a data file; ValueError names the file and the line that is wrong."""
    return read_data_file([path], reading or Reading()).conversations


def read_data_file(paths: Sequence[Path], reading: Reading, may_be_empty: bool = False) -> DataFile:
    """The conversations of a file or of its shards; ValueError also where none is left of its rows."""
    data = DataFile()
    for where, found in each_conversation(paths, reading, data):
        if isinstance(found, Conversation):
            data.conversations.append(found)
        elif reading.skip_bad:
            data.bad.append(one_line(f"{where}: {found}"))
        else:
            raise ValueError(f"{where}: {found}")
    if may_be_empty and not data.bad and not data.conversations:
        return DataFile(notes=[f"{paths[0].name} is empty"])
    if missing := [name for name in reading.columns.values() if name not in data.columns]:
        raise ValueError(f'{paths[0]}: --columns names "{missing[0]}", and no row has it')
    if data.bad and not data.conversations:
        raise ValueError(f"{paths[0]}: no row can be read; the first: {data.bad[0]}")
    if not data.conversations:
        raise ValueError(f"{paths[0]}: must hold at least one example, got an empty file")
    return data


def each_conversation(
    paths: Sequence[Path], reading: Reading, data: DataFile
) -> Iterator[tuple[str, Conversation | ValueError]]:
    """("file:line", the conversation or why there is none); notes in `data` what is not used."""
    for path in paths:
        for where, value in raw_rows(path):
            try:
                if isinstance(value, ValueError):
                    raise value
                data.columns |= value.keys() if isinstance(value, dict) else set()
                found, unused = to_conversation(value, where, reading.columns)
            except ValueError as error:
                yield where, error
                continue
            except RecursionError:
                yield where, ValueError("a row must not be nested so deeply")
                continue
            data.unused.update(dict.fromkeys(sorted(unused)))
            keys = {key for message in found.messages for key in message if key not in KNOWN_KEYS}
            data.unknown.update(dict.fromkeys(sorted(keys)))
            yield where, with_inline_reasoning(found) if reading.inline_reasoning else found
