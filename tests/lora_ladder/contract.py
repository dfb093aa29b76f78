"""Checks the form of every answer of a trainer; a wrong one fails with one sentence that names the member.

Only types and shapes are checked here. Whether the numbers are right, or even finite, is judged by the rungs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from tests.derived import Divergence

# What a member must return, in words; and (answer, vocab_size, *arguments) -> whether the answer is that.
Rule = tuple[str, Callable[..., bool]]


def is_number(value: Any) -> bool:
    return np.ndim(value) == 0 and np.asarray(value).dtype.kind in "iuf"


def are_numbers(values: Any, count: int) -> bool:
    return not isinstance(values, str) and np.shape(values) == (count,) and all(map(is_number, values))


def is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "iuf"


def are_arrays(values: Any) -> bool:
    return isinstance(values, Mapping) and all(isinstance(n, str) and is_array(a) for n, a in values.items())


def are_logits(value: Any, vocab_size: int, tokens_BT: np.ndarray) -> bool:
    return is_array(value) and value.shape == (*tokens_BT.shape, vocab_size)


def are_tokens(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(token, int | np.integer) for token in values)


def are_names(values: Any) -> bool:
    is_many = isinstance(values, Iterable) and not isinstance(values, str)
    return is_many and all(isinstance(name, str) for name in values)


ARRAYS: Rule = ("a dict of NumPy arrays by name", lambda answer, *_: are_arrays(answer))
NATS: Rule = ("a pair, the sum of nats and the number of targets", lambda answer, *_: are_numbers(answer, 2))
LOGITS: Rule = ("a NumPy array of shape (rows, tokens, vocabulary)", are_logits)
NUMBER: Rule = ("a number", lambda answer, *_: is_number(answer))
TOKENS: Rule = ("a list of token numbers", lambda answer, *_: are_tokens(answer))


def are_batches(values: Any) -> bool:
    """Micro-batches of an update, each with arrays of one shape (rows, positions)."""
    return len(values) > 0 and all(
        np.ndim(batch.inputs_BT) == 2
        and all(is_array(x_BT) and x_BT.dtype.kind in "iu" for x_BT in batch[:2])
        and batch.mask_BT.dtype.kind == "b"
        and all(x_BT.shape == batch.inputs_BT.shape for x_BT in batch[1:3])
        and (batch.segment_BT is None or batch.segment_BT.shape == batch.inputs_BT.shape)
        for batch in values
    )


def are_examples(values: Any) -> bool:
    return isinstance(values, list) and all(
        are_tokens(list(tokens)) and len(tokens) == len(is_target) and set(is_target) <= {True, False}
        for tokens, is_target in values
    )


EACH_UPDATE: Rule = (
    "a number for each update",
    lambda answer, _, windows, *rest: are_numbers(answer, len(windows)),
)

EACH_RANK: Rule = (
    "for each rank a pair, the losses of the updates and the factors",
    lambda answer, _, windows, training, num_ranks: (
        len(answer) == num_ranks
        and all(are_numbers(losses, len(windows)) and are_arrays(arrays) for losses, arrays in answer)
    ),
)

FACTORS_OF_RANKS: Rule = (
    "for each rank a dict of NumPy arrays by name",
    lambda answer, _, seed, num_ranks: len(answer) == num_ranks and all(map(are_arrays, answer)),
)

FILES_OF_RANKS: Rule = (
    "for each rank a list of names",
    lambda answer, _, windows, training, folders: (
        len(answer) == len(folders) and all(isinstance(names, list) and are_names(names) for names in answer)
    ),
)

RULES: dict[str, Rule] = {
    "logits": LOGITS,
    "loss": NATS,
    "gradients": ARRAYS,
    "factors": ARRAYS,
    "base": ARRAYS,
    "hidden_states": ARRAYS,
    "loss_of_logits": NATS,
    "evaluate": NUMBER,
    "micro_batches": (
        "for each update a list of Batch, whose arrays have one shape (rows, positions)",
        lambda answer, *_: isinstance(answer, list) and all(map(are_batches, answer)),
    ),
    "read_examples": ("a list of pairs (token ids, is_target)", lambda answer, *_: are_examples(answer)),
    "fit": (
        "a loss for each update, and a validation loss before the first one and after each",
        lambda answer, _, examples, training, num_updates, validation, *rest: (
            are_numbers(answer[0], num_updates)
            and are_numbers(answer[1], (num_updates + 1) if validation else 0)
        ),
    ),
    "pullback": ARRAYS,
    "optimizer_names": ("the names of parameters", lambda answer, *_: are_names(answer)),
    "learning_rates": (
        "a number for each update",
        lambda answer, _, training: are_numbers(answer, training.iters),
    ),
    "peak_bytes": NUMBER,
    "train_on_ranks": EACH_RANK,
    "initial_factors_on_ranks": FACTORS_OF_RANKS,
    "save_on_ranks": FILES_OF_RANKS,
    "each_update": ("an iterator of losses", lambda answer, *_: isinstance(answer, Iterator)),
    "greedy": TOKENS,
    "greedy_all": (
        "a list of token numbers for each prompt",
        lambda answer, _, prompts, *rest: len(answer) == len(prompts) and all(map(are_tokens, answer)),
    ),
} | dict.fromkeys(
    ("train", "train_compiled", "train_checkpointed", "token_counts", "gradient_norms"), EACH_UPDATE
)


def described(answer: Any) -> str:
    """The type, and the size where there is one; never the numbers."""
    kind = type(answer).__name__
    if is_array(answer):
        return f"{kind} of shape {answer.shape}"
    if isinstance(answer, Mapping):
        wrong = next((n for n, a in answer.items() if not (isinstance(n, str) and is_array(a))), None)
        return f"{kind} in which {wrong!r} is {type(answer[wrong]).__name__}" if wrong is not None else kind
    if isinstance(answer, list | tuple | set):
        kinds = ", ".join(sorted({type(value).__name__ for value in answer}))
        return f"{kind} of {len(answer)}" + f" ({kinds})" * bool(kinds)
    return kind


class Checked:
    """Wraps a trainer and checks each of its answers; otherwise it behaves like the trainer."""

    def __init__(self, trainer: Any, vocab_size: int) -> None:
        self._trainer, self._vocab_size = trainer, vocab_size

    def __getattr__(self, name: str) -> Any:
        # Python looks up such names itself, for instance to copy, perhaps before `_trainer` exists.
        if name.startswith("_"):
            raise AttributeError(name)
        member = getattr(self._trainer, name)
        if name not in RULES:
            return member
        wanted, holds = RULES[name]

        def call(*given: Any) -> Any:
            __tracebackhide__ = True
            answer = member(*given)
            if not is_held(holds, answer, self._vocab_size, *given):
                raise Divergence(f"{name}() must return {wanted}, got {described(answer)}")
            return answer

        return call


def is_held(holds: Callable[..., bool], *answer_and_arguments: Any) -> bool:
    """False also where the rule itself raises, as for a ragged list or an object without a length."""
    try:
        return holds(*answer_and_arguments)
    except (TypeError, ValueError):
        return False
