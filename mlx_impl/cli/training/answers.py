"""Ask a model questions, with greedy decoding, and mark the answers by an expected text."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

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
from ..screen.console import Watch, watch_on

MIN_TOKENS = 24  # of an answer, where the replies of the data are shorter


@dataclass(frozen=True)
class Answer:
    question: str
    expected: str | None  # words that a right answer holds; None: it is not judged
    text: str
    is_cut: bool = False  # the model had not ended it after the most tokens
    reply: str = ""  # the data's own reply, beside an answer that is not judged

    @property
    def is_judged(self) -> bool:
        return self.expected is not None

    @property
    def is_right(self) -> bool:
        """Whether the expected words occur in the answer, as whole words and in their order."""
        return self.is_judged and f" {normalized(self.expected or '')} " in f" {normalized(self.text)} "

    @property
    def verdict(self) -> str:
        """right, cut or wrong; of an answer that is not judged, cut or nothing."""
        if self.is_right or self.is_cut:
            return "right" if self.is_right else "cut"
        return "wrong" if self.is_judged else ""


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
    max_tokens: int = MIN_TOKENS,
    watch: Watch | None = None,
) -> list[Answer]:
    """The model's answers, each of at most `max_tokens` tokens, in place of the conversations' last replies.

    `plain`: one after the other. `ranks` share out what is decoded together, and all get all answers.
    `watch` shows the progress, on the console by default.
    """
    progress = watch or watch_on(console)
    prompts, limits = prompts_of(tokenizer, conversations), (max_tokens, tokenizer.stop_ids)
    own = slice(ranks.rank, None, ranks.size) if ranks else slice(None)
    if plain:
        rows = range(len(prompts))[own]
        replies = answer_each(model, prompts, *limits, progress(rows, len(rows), "asking"))
    else:
        replies = generate_all(model, prompts, *limits, *shown_by(progress, own, len(prompts)))
    if ranks:  # a reply is empty on all ranks but one
        replies = [max(of_each, key=len) for of_each in zip(*ranks.gather_objects(replies), strict=True)]
    return [
        answer_of(c, tokenizer.decode(reply).strip(), is_cut=len(reply) == max_tokens)
        for c, reply in zip(conversations, replies, strict=True)
    ]


def shown_by(progress: Watch, own: slice, num_prompts: int) -> tuple[Callable[..., Iterable[int]], ...]:
    """`show_batches` and `show_lengths` of `generate_all`: of one batch the progress is that of its tokens.

    Of the batches only `own` are decoded.
    """
    if num_prompts <= MAX_ROWS:
        return (
            lambda starts, _: starts[own],
            lambda lengths: progress(lengths, len(lengths), "tokens of the answers"),
        )
    return (lambda starts, _: progress(starts[own], len(starts[own]), "asking"),)


def answer_of(conversation: Conversation, text: str, is_cut: bool) -> Answer:
    """Beside the data's own reply where the row names no right answer."""
    expected = conversation.answer
    reply = "" if expected is not None else reply_text(conversation)
    return Answer(conversation.question, expected, text, is_cut, reply)


def reply_text(conversation: Conversation) -> str:
    """The last reply of the data; a call of tools as JSON."""
    message = conversation.messages[-1]
    calls = message.get("tool_calls")
    return message.get("content") or (json.dumps(calls, ensure_ascii=False) if calls else "")


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
    loaded: LoadedModel, conversations: Sequence[Conversation], plain: bool, max_tokens: int
) -> list[str]:
    """Remarks where free memory is short; ValueError where a memory limit would be exceeded."""
    prompts = prompts_of(loaded.tokenizer, conversations)
    return require_generation_memory(loaded.model, prompts, max_tokens, 1 if plain else MAX_ROWS)


def fraction_right(answers: Sequence[Answer]) -> float:
    return sum(answer.is_right for answer in answers) / len(answers)


def are_judged(answers: Sequence[Answer]) -> bool:
    return any(answer.is_judged for answer in answers)
