"""An answer that is read in part, with updates in between: the updates drop, and the answer does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from mlx_impl import LoRAConfig, LoRATrainer, TrainConfig
from mlx_impl.data import Example
from mlx_impl.fast import answer as fast
from mlx_impl.generate import generate, most_likely
from mlx_impl.lora import lora_layers
from mlx_impl.model import CausalLM
from tests.lora_ladder.cases import SPEC

EXAMPLES = [Example((5, 9, 2, 7, 11, 3), (False, False, True, True, True, True))]
PROMPT, NUM_TOKENS = [5, 9, 2], 6


def trainer_of(dropout: float, learning_rate: float = 0.01, plain: bool = False) -> LoRATrainer:
    mx.random.seed(3)
    training = TrainConfig(iters=4, learning_rate=learning_rate, batch_size=1)
    return LoRATrainer(CausalLM(SPEC), LoRAConfig(rank=2, dropout=dropout), training, plain=plain)


def losses(trainer: LoRATrainer, answer: Iterator[int] | None = None) -> list[float]:
    """With one more token of the answer read after each update."""
    found = []
    for record in trainer.fit(EXAMPLES):
        found.append(record.loss_nats)
        list(islice(answer or (), 1))
    return found


each_generate = pytest.mark.parametrize("generate", [generate, fast.generate], ids=["plain", "fast"])


@each_generate
@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
def test_an_answer_read_in_part_leaves_dropout_on_for_the_next_update(
    plain: bool, generate: Callable[..., Iterator[int]]
) -> None:
    """The same losses, to the bit, as without the answer."""
    trainer = trainer_of(0.5, plain=plain)
    answer = generate(trainer.model, PROMPT, NUM_TOKENS, ())
    assert losses(trainer, answer) == losses(trainer_of(0.5, plain=plain))


def as_if_drawn(logits_BV: mx.array) -> mx.array:
    """The likeliest token; the fast path reads ahead with `most_likely` alone."""
    return mx.argmax(logits_BV, axis=-1)


@each_generate
@pytest.mark.parametrize("choose", [most_likely, as_if_drawn], ids=["read ahead", "not read ahead"])
def test_an_update_while_an_answer_is_read_does_not_drop_its_inputs(
    choose: Callable[[mx.array], mx.array], generate: Callable[..., Iterator[int]]
) -> None:
    """At rate 0 the model is the same after every update, so the answer is too."""
    trainer = trainer_of(0.9, learning_rate=0.0)
    for layer in lora_layers(trainer.model).values():
        layer.lora_b = mx.random.normal(layer.lora_b.shape)  # far from the base model
    whole = list(generate(trainer.model, PROMPT, NUM_TOKENS, (), choose))
    answer = generate(trainer.model, PROMPT, NUM_TOKENS, (), choose)
    read = [next(answer)]
    for _ in trainer.fit(EXAMPLES):
        read += islice(answer, 1)
    assert [*read, *answer] == whole


def test_an_answer_follows_the_updates_made_while_it_is_read() -> None:
    """The next token is of the new factors, as in the plain code, and not of what was looked up before."""

    def tokens(how: Callable[..., Iterator[int]], learning_rate: float) -> list[int]:
        trainer = trainer_of(0.0, learning_rate)
        for number, layer in enumerate(lora_layers(trainer.model).values()):
            layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(number))
        answer = how(trainer.model, PROMPT, NUM_TOKENS, (), as_if_drawn)
        read = [next(answer)]
        for _ in trainer.fit(EXAMPLES):
            read += islice(answer, 1)
        return [*read, *answer]

    followed = tokens(generate, 1.0)
    assert tokens(fast.generate, 1.0) == followed != tokens(generate, 0.0)


def two_answers_in_turn(generate: Callable[..., Iterator[int]]) -> list[list[int]]:
    """Some tokens of each after every update, and after another adapter has been put into the model."""
    trainer = trainer_of(0.0, learning_rate=0.3)
    other = tree_map(lambda factor: mx.sin(1000 * factor + 1), trainer.model.trainable_parameters())
    answers = [generate(trainer.model, PROMPT, 40, (), as_if_drawn) for _ in range(2)]
    read = [list(islice(answer, 2)) for answer in answers]
    for _ in trainer.fit(EXAMPLES):
        for tokens, answer in zip(read, answers, strict=True):
            tokens += islice(answer, 3)
    trainer.model.update(other)
    for tokens, answer in zip(read, answers, strict=True):
        tokens += islice(answer, 8)
    return read


def test_each_of_two_answers_follows_the_factors_as_the_plain_ones_do() -> None:
    """Whichever of them has turned dropout off first."""
    first, second = two_answers_in_turn(generate)
    assert first == second and len(set(first)) > 3
    assert two_answers_in_turn(fast.generate) == [first, second]
