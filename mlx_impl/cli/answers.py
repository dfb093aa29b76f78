"""What a model answers: questions asked greedily, answers judged by the word that must stand in them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoint import LoadedModel
from ..fitting import require_answers
from ..generate import MAX_ROWS, generate_all
from ..model import CausalLM
from ..rows import Conversation
from ..tokenizer import ChatTokenizer

MAX_TOKENS = 24  # of an answer


@dataclass(frozen=True)
class Answer:
    question: str
    expected: str
    text: str

    @property
    def is_right(self) -> bool:
        return f" {fold(self.expected)} " in f" {fold(self.text)} "


def fold(text: str) -> str:
    """Lower case, no accents, words separated by single spaces: "N'Djaména!" and "n djamena" are one."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    kept = "".join(c for c in plain if not unicodedata.combining(c))
    return " ".join("".join(c if c.isalnum() else " " for c in kept).split())


def ask(model: CausalLM, tokenizer: ChatTokenizer, conversations: Sequence[Conversation]) -> list[Answer]:
    """The model's greedy answers to all conversations that say what a right answer contains."""
    judged = [c for c in conversations if c.answer is not None]
    replies = generate_all(model, prompts_of(tokenizer, judged), MAX_TOKENS, tokenizer.stop_ids)
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
