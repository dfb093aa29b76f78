"""The losses and answers of a run before and after training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console

from ...data import Batch, Example, evaluation_batches
from ...run.trainer import LoRATrainer
from ...text.conversation import Conversation
from ..screen.console import Watch, printable, watch_on
from .answers import Answer, Evaluation, ask
from .job import PreparedJob
from .samples import evenly_spaced

MAX_NATS = 700.0  # above it exp, the perplexity, overflows
SHOWN_CHARACTERS = 200  # of a sample's question and of its answer


def evaluate_model(prepared: PreparedJob, console: Console, when: str) -> Evaluation:
    """The loss over training examples, and the answers to all questions."""
    loss_nats = training_set_loss(prepared, console, when)
    questions = [c for group in prepared.asked.questions.values() for c in group]
    if questions:
        console.print(f"asking {len(questions)} questions")
    answers = iter(answers_to(prepared, questions, console))
    by_group = {name: [next(answers) for _ in group] for name, group in prepared.asked.questions.items()}
    return Evaluation(loss_nats, by_group)


def answers_to(
    prepared: PreparedJob, questions: list[Conversation], console: Console, watch: Watch | None = None
) -> list[Answer]:
    loaded, job = prepared.loaded, prepared.job
    limits = job.plain, job.ranks, prepared.asked.max_tokens, watch
    return ask(loaded.model, loaded.tokenizer, questions, console, *limits)


def show_samples(prepared: PreparedJob, console: Console, watch: Watch) -> None:
    """Print the answers to a few held-out rows, in the middle of training."""
    step = prepared.trainer.step
    for answer in answers_to(prepared, prepared.asked.samples, console, watch):
        end = " ..." if answer.is_cut else ""
        console.print(f"step {step}: {shortened(answer.question)}\n  -> {shortened(answer.text)}{end}")


def shortened(text: str) -> str:
    """One line of a text, for the screen."""
    line = " ".join(printable(text).split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]} ..."


def test_result(prepared: PreparedJob, console: Console) -> dict[str, Any]:
    """The loss over the examples of --test, all of them; nothing without that flag."""
    examples, trainer = prepared.test, prepared.trainer
    if not examples:
        return {}
    loss_nats = trainer.evaluate_batches(watched_batches(examples, trainer, "testing", watch_on(console)))
    console.print(f"test loss: {loss_nats:.4f} nats per target token over {len(examples)} examples")
    return {
        "test_loss": loss_nats,
        "test_perplexity": perplexity(loss_nats),
        "test_examples": len(examples),
    }


def watched_batches(
    examples: Sequence[Example], trainer: LoRATrainer, text: str, watch: Watch
) -> Iterable[Batch]:
    """The batches of an evaluation, with progress."""
    size = trainer.training.batch_size
    return watch(evaluation_batches(examples, size), -(-len(examples) // size), text)


def training_set_loss(prepared: PreparedJob, console: Console, when: str) -> float:
    """Nats per target token over at most --eval-examples training examples; ValueError unless finite."""
    examples = evenly_spaced(prepared.train, prepared.job.eval_examples)
    batches = watched_batches(examples, prepared.trainer, "evaluating", watch_on(console))
    loss_nats = prepared.trainer.evaluate_batches(batches)
    if not math.isfinite(loss_nats):
        raise ValueError(
            f"the loss over the training set {when} training must be a finite number, got {loss_nats}"
        )
    is_whole = len(examples) == len(prepared.train)
    of = "the training set" if is_whole else f"{len(examples)} of {len(prepared.train)} training examples"
    console.print(f"loss over {of} {when} training: {loss_nats:.4f} nats per target token")
    return loss_nats


def perplexity(loss_nats: float | None) -> float | None:
    """exp(loss), the number of tokens among which the model as good as guesses; None where it overflows."""
    return math.exp(loss_nats) if loss_nats is not None and loss_nats < MAX_NATS else None
