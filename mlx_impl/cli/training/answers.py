"""What a model answers: questions asked greedily, answers judged by the word that must stand in them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from ...fast.decode import MAX_ROWS, generate_all
from ...files.checkpoint import LoadedModel
from ...model import CausalLM
from ...run.memory_check import require_answers
from ...text.rows import Conversation
from ...text.tokenizer import ChatTokenizer
from ..screen.console import counted

MAX_TOKENS = 24  # of an answer


@dataclass(frozen=True)
class Answer:
    question: str
    expected: str
    text: str

    @property
    def is_right(self) -> bool:
        return f" {fold(self.expected)} " in f" {fold(self.text)} "


@dataclass(frozen=True)
class Exam:
    """What the model knows at one time."""

    loss_nats: float  # mean over the targets of the training examples that are evaluated
    answers: dict[str, list[Answer]]  # by the names of QUESTION_FILES


def fold(text: str) -> str:
    """Lower case, no accents, words separated by single spaces: "N'Djaména!" and "n djamena" are one."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    kept = "".join(c for c in plain if not unicodedata.combining(c))
    return " ".join("".join(c if c.isalnum() else " " for c in kept).split())


def ask(
    model: CausalLM, tokenizer: ChatTokenizer, conversations: Sequence[Conversation], console: Console
) -> list[Answer]:
    """The model's greedy answers to all conversations that say what a right answer contains."""
    judged = [c for c in conversations if c.answer is not None]
    groups = partial(counted, text="asking", console=console)
    prompts = prompts_of(tokenizer, judged)
    replies = generate_all(model, prompts, MAX_TOKENS, tokenizer.stop_ids, groups)
    return [
        Answer(c.question, c.answer or "", tokenizer.decode(reply).strip())
        for c, reply in zip(judged, replies, strict=True)
    ]


def prompts_of(tokenizer: ChatTokenizer, conversations: Sequence[Conversation]) -> list[list[int]]:
    return [tokenizer.encode_prompt(c.messages[:-1], c.tools) for c in conversations]


def require_memory_to_ask(loaded: LoadedModel, conversations: Sequence[Conversation]) -> list[str]:
    """Remarks on what memory is short; ValueError where it is too little."""
    prompts = prompts_of(loaded.tokenizer, conversations)
    return require_answers(loaded.model, prompts, MAX_TOKENS, MAX_ROWS)


def share_right(answers: Sequence[Answer]) -> float:
    """From 0 to 1."""
    return sum(answer.is_right for answer in answers) / len(answers)
