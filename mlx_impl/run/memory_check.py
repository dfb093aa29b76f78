"""Whether a run fits into memory, checked before its first step; if not, which flags would help.

The need of a run is that of its largest batch: among its own batches (`batching.window_rows`) or, where these
are too many to go through, a batch of its longest rows. memory_model.py computes the need, memory_limits.py
finds the limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from ..batching import Row, rows_of, window_rows
from ..config import TrainConfig
from ..data import (
    WIDTH_BUCKETS,
    Example,
    bucket_size,
    evaluation_batches,
    make_packed_batch,
    make_plain_batch,
    num_inputs,
)
from ..fast.kept_positions import KEPT_BUCKETS
from ..fast.memory_model import answer_bytes, evaluation_bytes
from ..fast.memory_sizes import Shape, Sizes, shape_of, sizes_of
from ..fast.pace import update_bytes
from ..machine.memory_limits import Limit, TooLittleMemory, format_bytes, memory_limits, shortage
from ..model import CausalLM

if TYPE_CHECKING:
    from .trainer import LoRATrainer

MAX_ROWS_CHECKED = 10**6  # rows of all batches; going through more would take seconds
MIN_SEQ_LENGTH = 16  # the smallest --max-seq-length that is suggested


@dataclass(frozen=True)
class Workload:
    """Everything that decides how much memory a training run or an evaluation needs."""

    sizes: Sizes
    train: Sequence[Example]  # empty for an evaluation
    evaluated: tuple[Sequence[Example], ...]  # the sets whose loss is computed
    training: TrainConfig
    first_step: int = 0

    def bytes_needed(self) -> int:
        checkpointed = self.training.grad_checkpoint
        update = largest_update_bytes(self, lambda shape: update_bytes(self.sizes, shape, checkpointed))
        size = self.training.batch_size
        # Evaluation batches are sorted by length. The last one may be small, but the one before it is full.
        longest = [sorted(e, key=lambda example: len(example.tokens))[-2 * size :] for e in self.evaluated]
        batches = (batch for examples in longest for batch in evaluation_batches(examples, size))
        return max([update, *(evaluation_bytes(self.sizes, shape_of(batch)) for batch in batches)])

    def with_training(self, **fields: Any) -> Workload:
        """The workload with other values of these fields of TrainConfig."""
        return replace(self, training=replace(self.training, **fields))

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max((len(example.tokens) for e in (self.train, *self.evaluated) for example in e), default=0)

    def truncated(self, tokens: int) -> Workload:
        """The workload with --max-seq-length `tokens`."""
        train, *evaluated = (
            [Example(e.tokens[:tokens], e.is_target[:tokens]) for e in examples]
            for examples in (self.train, *self.evaluated)
        )
        training = replace(self.training, max_seq_length=min(tokens, self.training.max_seq_length))
        return replace(self, train=train, evaluated=tuple(evaluated), training=training)


def require_training_memory(
    trainer: LoRATrainer, train: Sequence[Example], *evaluated: Sequence[Example]
) -> list[str]:
    """Remarks where the free memory is short; TooLittleMemory where a hard limit would be exceeded."""
    sizes = sizes_of(trainer.model, trainer.plain)
    return check_workload(Workload(sizes, train, evaluated, trainer.training, trainer.step), memory_limits())


def require_evaluation_memory(model: CausalLM, examples: Sequence[Example], batch_size: int) -> list[str]:
    """The same for an evaluation without training."""
    training = TrainConfig(iters=1, batch_size=batch_size)
    return check_workload(Workload(sizes_of(model), (), (examples,), training), memory_limits())


def require_generation_memory(
    model: CausalLM, prompts: Sequence[Sequence[int]], max_tokens: int, rows: int = 1
) -> list[str]:
    """The same for generation, `rows` prompts at a time. It suggests no flag, as none shortens a prompt."""
    if not prompts:
        return []
    sizes = sizes_of(model)
    rows, longest = min(rows, len(prompts)), max(map(len, prompts))
    need = answer_bytes(sizes, Shape(rows, longest, rows * longest, rows), max_tokens)
    name = f"the longest prompt, of {longest} tokens,"
    return check_limits(name, need, memory_limits(), lambda _: "")


def check_workload(workload: Workload, limits: Sequence[Limit]) -> list[str]:
    need = workload.bytes_needed()
    return check_limits("the longest batch", need, limits, lambda limit: suggestion(workload, limit))


def check_limits(
    what: str, need: int, limits: Sequence[Limit], suggestion_for: Callable[[int], str]
) -> list[str]:
    """A remark for each soft limit below the need; TooLittleMemory where a hard limit is below it."""
    exceeded = [limit for limit in limits if need > limit.num_bytes]
    hard = [limit for limit in exceeded if limit.is_hard]
    if hard:
        raise TooLittleMemory(shortage(what, need, hard[0]) + suggestion_for(hard[0].num_bytes))
    return [
        f"{what} needs about {format_bytes(need)} but only {format_bytes(limit.num_bytes)} is free"
        f"{suggestion_for(limit.num_bytes)}"
        for limit in exceeded
    ]


def suggestion(workload: Workload, limit: int) -> str:
    """`: --batch-size 1 would need 3.1 GiB, --grad-checkpoint 4.0 GiB`: each flag that lowers the need."""
    now = workload.bytes_needed()
    needs = {flag: need for flag, need in needs_with_flags(workload, limit).items() if need < now}
    parts = [
        f"{flag} {'' if number else 'would need '}{format_bytes(need)}"
        for number, (flag, need) in enumerate(needs.items())
    ]
    return ": " + ", ".join(parts) if parts else ""


def needs_with_flags(workload: Workload, limit: int) -> dict[str, int]:
    """The bytes needed with each flag that may help, by the flag; with several flags where none is enough."""
    changes: dict[str, dict] = {}
    if workload.training.batch_size > 1:
        changes["--batch-size 1"] = {"batch_size": 1}
    if workload.train and not workload.training.grad_checkpoint:
        changes["--grad-checkpoint"] = {"grad_checkpoint": True}
    needs = {flag: workload.with_training(**change).bytes_needed() for flag, change in changes.items()}
    helpful = [flag for flag in changes if needs[flag] < workload.bytes_needed()]
    all_changes = {field: value for flag in helpful for field, value in changes[flag].items()}
    smallest, all_flags = workload.with_training(**all_changes), " ".join(helpful)
    if len(helpful) > 1 and min(needs.values()) > limit:
        needs[all_flags] = smallest.bytes_needed()
    needs |= longest_that_fits(workload, limit, "") or longest_that_fits(smallest, limit, all_flags)
    return needs


def longest_that_fits(workload: Workload, limit: int, flags: str) -> dict[str, int]:
    """The need with the largest power of two for --max-seq-length that fits; empty if none fits."""
    tokens = 1 << max(0, (workload.longest - 1).bit_length() - 1)
    while tokens >= MIN_SEQ_LENGTH:
        if (need := workload.truncated(tokens).bytes_needed()) <= limit:
            return {f"{flags} --max-seq-length {tokens}".strip(): need}
        tokens //= 2
    return {}


def largest_update_bytes(workload: Workload, bytes_for: Callable[[Shape], int]) -> int:
    """Bytes for the training batch that needs most: found by an estimate, then computed exactly."""
    if not workload.train or workload.first_step >= workload.training.iters:
        return 0
    lengths = [num_inputs(example) for example in workload.train]
    targets = [sum(example.is_target[1:]) for example in workload.train]

    def estimate(batch: Sequence[Row]) -> int:
        row_lengths = [sum(lengths[i] for i in row) for row in batch]
        width = bucket_size(max(1, *row_lengths), WIDTH_BUCKETS)
        computed = min(len(batch) * width, bucket_size(sum(row_lengths) + 1, KEPT_BUCKETS))
        return bytes_for(Shape(len(batch), width, computed, sum(targets[i] for row in batch for i in row)))

    make = make_packed_batch if workload.training.batching == "packed" else make_plain_batch
    largest = max(batches_to_check(workload, lengths), key=estimate)
    return bytes_for(shape_of(make(workload.train, largest)))


def batches_to_check(workload: Workload, lengths: Sequence[int]) -> Iterator[list[Row]]:
    """All batches of the run as rows of examples; for a long run only one of the longest rows."""
    training = workload.training
    rows = rows_of(lengths, training)
    if (training.iters - workload.first_step) * len(rows) > MAX_ROWS_CHECKED:
        yield sorted(rows, key=lambda row: sum(lengths[i] for i in row))[-training.batch_size :]
        return
    windows = window_rows(lengths, training, workload.first_step)
    yield from chain.from_iterable(islice(windows, max(0, training.iters - workload.first_step)))
