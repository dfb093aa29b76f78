"""Conversations -> tokens with their targets marked -> padded batches. NumPy only.

Each token carries its own mark "this one is a target" from the tokenizer to the loss, so padding, prompt and
answer cannot be confused. Differs from reference/: the reference is handed these arrays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .config import TrainConfig

Message = dict[str, str]  # {"role": ..., "content": ...}

SHAPE_STEP = 8  # sizes of batches are multiples of it, so that a compiled step meets few shapes


@dataclass(frozen=True)
class Conversation:
    """One line of a data file."""

    messages: tuple[Message, ...]
    answer: str | None  # what a right reply must contain, where the file says so
    where: str  # "file:line", for error messages


@dataclass(frozen=True)
class Example:
    """Token numbers, and of each whether the model is trained to predict it."""

    tokens: tuple[int, ...]
    is_target: tuple[bool, ...]


class Batch(NamedTuple):
    inputs_BT: np.ndarray
    targets_BT: np.ndarray  # the token after each input
    mask_BT: np.ndarray  # whether that token counts
    num_tokens: int  # inputs that are no padding
    numbers: tuple[int, ...] = ()  # which examples of the file these are, from 0
    segment_BT: np.ndarray | None = None  # of packed rows: which example of its row an input belongs to


Window = list[Batch]  # the batches of one optimizer update


def read_conversations(path: Path) -> list[Conversation]:
    """A JSON Lines file of {"messages": [...]}; ValueError names the file and the line."""
    if not path.is_file():
        raise ValueError(f"{path}: a data file must be a file, and there is none of this name")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # U+2028 ends no line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text: {error.reason}") from None
    rows = [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path}: needs at least one example, got an empty file")
    return [parse_conversation(line, where) for where, line in rows]


def parse_conversation(line: str, where: str) -> Conversation:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a line of JSON: {error}") from None
    if not isinstance(row, dict) or "messages" not in row:
        raise ValueError(f'{where}: a line must be an object with the key "messages"')
    messages = row["messages"]
    if not isinstance(messages, list) or not all(is_message(message) for message in messages):
        raise ValueError(f'{where}: "messages" must be a list of objects with the texts "role" and "content"')
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            f'{where}: "messages" must end with the reply of role "assistant" to an earlier message'
        )
    answer = row.get("answer")
    if answer is not None and not (isinstance(answer, str) and any(map(str.isalnum, answer))):
        raise ValueError(f'{where}: "answer" must be a text with a letter or a digit, got {answer!r}')
    return Conversation(tuple(messages), answer, where)


def is_message(value: object) -> bool:
    return isinstance(value, dict) and all(is_text(value.get(key)) for key in ("role", "content"))


def is_text(value: object) -> bool:
    """A string that is Unicode; JSON can spell half a surrogate pair, which no tokenizer reads."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def make_batch(examples: Sequence[Example], numbers: Sequence[int] = ()) -> Batch:
    """Rows padded on the right to a common width; position t predicts token t + 1."""
    longest = max(1, *(len(example.tokens) - 1 for example in examples))
    width = rounded_up(longest)
    tokens = np.zeros((len(examples), width + 1), dtype=np.int32)
    is_target = np.zeros((len(examples), width + 1), dtype=bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        is_target[row, : len(example.tokens)] = example.is_target
    num_tokens = sum(len(example.tokens) - 1 for example in examples)
    return Batch(tokens[:, :-1], tokens[:, 1:], is_target[:, 1:], num_tokens, tuple(numbers))


def rounded_up(size: int) -> int:
    return -(-size // SHAPE_STEP) * SHAPE_STEP


def target_positions(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """positions_N in the flattened batch that have a target, the targets_N, and mask_N: False is filling."""
    positions_N = np.flatnonzero(batch.mask_BT)
    filling = rounded_up(max(1, len(positions_N))) - len(positions_N)
    padded_N = np.pad(positions_N, (0, filling))
    return padded_N, batch.targets_BT.reshape(-1)[padded_N], np.arange(len(padded_N)) < len(positions_N)


def window_numbers(step: int, num_examples: int, config: TrainConfig) -> list[list[int]]:
    """The example numbers of each batch of update `step`, counted from 0: a function of the step alone.

    Every epoch takes each example once, in an order of its own. The last batch of an epoch is smaller where
    the division leaves a remainder, and the last window has fewer batches; nothing is dropped.
    """
    size = config.batch_size * config.grad_accumulation_steps
    epoch, index = divmod(step, -(-num_examples // size))
    order = np.random.default_rng([config.data_seed, epoch]).permutation(num_examples)
    chosen = order[index * size : (index + 1) * size].tolist()
    return [chosen[i : i + config.batch_size] for i in range(0, len(chosen), config.batch_size)]


def training_windows(
    examples: Sequence[Example], config: TrainConfig, first_step: int = 0
) -> Iterator[Window]:
    """The windows of the updates from `first_step` to the last."""
    if not examples:
        raise ValueError("training needs at least one example, got none")
    for step in range(first_step, config.iters):
        batches = window_numbers(step, len(examples), config)
        window = [make_batch([examples[i] for i in numbers], numbers) for numbers in batches]
        if not any(batch.mask_BT.any() for batch in window):
            numbers = ", ".join(str(i + 1) for batch in batches for i in batch)
            raise ValueError(f"an update needs at least one target, and the examples {numbers} have none")
        yield window


def require_tokens(examples: Sequence[Example], vocab_size: int) -> None:
    """ValueError that names the first example with a token that is not in the vocabulary."""
    for number, example in enumerate(examples, 1):
        if example.tokens and not 0 <= min(example.tokens) <= max(example.tokens) < vocab_size:
            raise ValueError(f"example {number}: tokens must be at least 0 and less than {vocab_size}")


def evaluation_batches(examples: Sequence[Example], batch_size: int) -> Iterator[Batch]:
    """Every example once, neighbours of like length together to save padding."""
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    for start in range(0, len(ordered), batch_size):
        yield make_batch(ordered[start : start + batch_size])
