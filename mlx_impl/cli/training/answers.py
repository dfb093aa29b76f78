"""Ask a model questions, with greedy decoding, and mark the answers by an expected text."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from ...fast.decode import MAX_ROWS, generate_all
from ...files.checkpoint import LoadedModel
from ...generate import generate
from ...model import CausalLM
from ...run.memory_check import require_generation_memory
from ...run.ranks import Ranks
from ...text.conversation import Conversation
from ...text.plain_text import encode_question
from ...text.tokenizer import ChatTokenizer
from ..screen.console import show_progress

MAX_TOKENS = 24  # of an answer


@dataclass(frozen=True)
class Answer:
    question: str
    expected: str
    text: str

    @property
    def is_right(self) -> bool:
        """Whether the expected words occur in the answer, as whole words and in their order."""
        return f" {normalized(self.expected)} " in f" {normalized(self.text)} "


@dataclass(frozen=True)
class Evaluation:
    """Loss and answers of a model, before or after training."""

    loss_nats: float  # per target of the evaluated training examples
    answers: dict[str, list[Answer]]  # by the names of QUESTION_FILES


def normalized(text: str) -> str:
    """Lower case without accents, words separated by single spaces: "N'Djaména!" becomes "n djamena"."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    kept = "".join(c for c in plain if not unicodedata.combining(c))
    return " ".join("".join(c if c.isalnum() else " " for c in kept).split())


def ask(
    model: CausalLM,
    tokenizer: ChatTokenizer,
    conversations: Sequence[Conversation],
    console: Console,
    plain: bool = False,
    ranks: Ranks | None = None,
) -> list[Answer]:
    """The model's answers to the conversations that have an expected answer.

    `plain`: one after the other. `ranks` share out what is decoded together, and all get all answers.
    """
    questions = [c for c in conversations if c.answer is not None]
    progress = partial(show_progress, text="asking", console=console)
    prompts = prompts_of(tokenizer, questions)
    limits = MAX_TOKENS, tokenizer.stop_ids
    own = slice(ranks.rank, None, ranks.size) if ranks else slice(None)
    if plain:
        replies = answer_each(model, prompts, *limits, progress(range(len(prompts))[own], len(prompts)))
    else:
        replies = generate_all(
            model, prompts, *limits, lambda groups, count: progress(groups[own], len(groups[own]))
        )
    if ranks:  # a reply is empty on all ranks but one
        replies = [max(of_each, key=len) for of_each in zip(*ranks.gather_objects(replies), strict=True)]
    return [
        Answer(c.question, c.answer or "", tokenizer.decode(reply).strip())
        for c, reply in zip(questions, replies, strict=True)
    ]


def answer_each(
    model: CausalLM, prompts: list[list[int]], max_tokens: int, stop_ids: Collection[int], rows: Iterable[int]
) -> list[list[int]]:
    """The replies to the prompts of these rows; no tokens for the others."""
    replies: list[list[int]] = [[] for _ in prompts]
    for row in rows:
        replies[row] = list(generate(model, prompts[row], max_tokens, stop_ids))
    return replies


def prompts_of(tokenizer: ChatTokenizer, conversations: Sequence[Conversation]) -> list[list[int]]:
    return [encode_question(tokenizer, c) for c in conversations]


def askable(
    tokenizer: ChatTokenizer, questions: dict[str, list[Conversation]]
) -> tuple[dict[str, list[Conversation]], list[str]]:
    """The questions that the chat template does not refuse, and one remark on each of the others."""
    kept: dict[str, list[Conversation]] = {}
    remarks = []
    for name, group in questions.items():
        for conversation in group:
            try:
                encode_question(tokenizer, conversation)
            except ValueError as error:
                remarks.append(f"a question is not asked: {conversation.where}: {error}")
            else:
                kept.setdefault(name, []).append(conversation)
    return kept, remarks


def require_memory_for_questions(
    loaded: LoadedModel, conversations: Sequence[Conversation], plain: bool
) -> list[str]:
    """Remarks where free memory is short; ValueError where a memory limit would be exceeded."""
    prompts = prompts_of(loaded.tokenizer, conversations)
    return require_generation_memory(loaded.model, prompts, MAX_TOKENS, 1 if plain else MAX_ROWS)


def fraction_right(answers: Sequence[Answer]) -> float:
    return sum(answer.is_right for answer in answers) / len(answers)
