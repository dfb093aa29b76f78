"""The data of a `train` command: its conversations, and the questions that are asked before and after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...files.checkpoint import LoadedModel
from ...text.conversation import Conversation
from ...text.examples import Encoded, encode_file
from ...text.rows import DataFile, Reading, read_data_file
from ...text.splits import read_optional_split, read_split
from ..screen.console import StatusLine
from .answers import askable
from .samples import choose_samples, longest_reply, max_answer_tokens

# The names under which the report lists the questions of a file.
QUESTION_FILES = {"trained": "train", "unseen": "test", "control": "control"}
SAMPLE = "sample"  # the name of those that have no expected answer
KINDS = {"train": "training", "valid": "validation"}  # of a file's examples, in remarks
Questions = dict[str, list[Conversation]]  # by the names of QUESTION_FILES, or SAMPLE


@dataclass(frozen=True)
class JobData:
    """What the files of the data hold."""

    files: dict[str, DataFile]
    test: list[Conversation]  # of --test
    remarks: list[str]

    @property
    def train(self) -> list[Conversation]:
        return self.files["train"].conversations

    @property
    def valid(self) -> list[Conversation]:
        return self.files["valid"].conversations


@dataclass(frozen=True)
class Asked:
    """What is asked, and how many tokens an answer may have."""

    questions: Questions  # asked before and after; where no row names an answer, the samples
    samples: list[Conversation]  # a few held-out rows
    max_tokens: int
    remarks: list[str]


@dataclass(frozen=True)
class Limits:
    """Of the questions; None: as many as there are, or as long as the data's replies."""

    num_questions: int | None
    max_answer_tokens: int | None
    max_prompt_tokens: int  # of a sample


def read_data(folder: Path, reading: Reading, test: bool | Path | None) -> JobData:
    """All files of the data, and that of --test; remarks on what is not used of them."""
    files = {"train": read_split(folder, "train", reading)}
    files |= {name: read_optional_split(folder, name, reading) for name in ("valid", "test", "control")}
    remarks = [remark for name, file in files.items() for remark in file.remarks(KINDS.get(name, name))]
    if not test:
        return JobData(files, [], remarks)
    if test is True:
        return JobData(files, read_split(folder, "test", reading).conversations, remarks)
    tested = read_data_file([test], reading)
    return JobData(files, tested.conversations, remarks + tested.remarks(f"--test {test.name}"))


def encode_data(
    loaded: LoadedModel, data: JobData, encoding: tuple[str, int, str, bool], tell: StatusLine
) -> dict[str, Encoded]:
    """The examples of each file, by what they are for; `encoding` as `encode_file` takes it."""
    encoded = {}
    for kind, rows in (("training", data.train), ("validation", data.valid), ("test", data.test)):
        tell(f"encoding {len(rows):,} {kind} examples")
        progress = tell.count(f"encoding {kind} examples")
        encoded[kind] = encode_file(loaded.tokenizer, rows, *encoding, progress=progress)
    return encoded


def questions_of(
    loaded: LoadedModel, data: JobData, reading: Reading, reasoning: str, limits: Limits
) -> Asked:
    """The rows that name an answer, by their file; where there are none, a few held-out rows."""
    rows = {name: data.files[file].conversations for name, file in QUESTION_FILES.items()}
    with_answer = {name: [c for c in group if c.answer is not None] for name, group in rows.items()}
    are_samples = not any(with_answer.values())
    remarks: list[str] = []
    questions = {name: few for name, group in with_answer.items() if (few := group[: limits.num_questions])}
    if reading.skip_bad:
        questions, remarks = askable(loaded.tokenizer, questions)
    held_out = next(file for name in ("valid", "test", "train") if (file := data.files[name].conversations))
    samples = choose_samples(loaded.tokenizer, held_out, limits.max_prompt_tokens)
    if are_samples and (few := samples[: limits.num_questions]):
        questions = {SAMPLE: few}
    read = [rows[name] for name in questions if name in rows] or [samples]
    longest = max(longest_reply(loaded.tokenizer, group, reasoning) for group in read)
    tokens = limits.max_answer_tokens or max_answer_tokens(longest, are_samples)
    return Asked(questions, samples, tokens, remarks)
