"""Whether a run fits into memory, asked before its first step; if not, which flags would help, and how much.

The largest batch of the run is looked for among its own batches (`batching.window_rows`), or, where these are
too many to go through, made of its longest rows. memory_model.py says what it needs, memory_limits.py what
there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
from ..fast.memory_model import (
    Shape,
    Sizes,
    answer_bytes,
    evaluation_bytes,
    shape_of,
    sizes_of,
    training_bytes,
)
from ..machine.memory_limits import Limit, TooLittle, limits, refusal, shown
from ..model import CausalLM
from .trainer import LoRATrainer

MANY = 10**6  # of updates times rows: more would take seconds to go through
SHORTEST = 16  # tokens that --max-seq-length is lowered to


@dataclass(frozen=True)
class Run:
    """What memory is needed for; each flag makes another run of it."""

    sizes: Sizes
    train: Sequence[Example]  # none: an evaluation
    judged: tuple[Sequence[Example], ...]  # sets whose loss is computed
    training: TrainConfig
    first_step: int = 0

    def need(self) -> int:
        checkpointed = self.training.grad_checkpoint
        of_updates = largest_update(self, lambda shape: training_bytes(self.sizes, shape, checkpointed))
        size = self.training.batch_size
        # The batches are sorted by length: the last may be small, the one before it is full.
        last = [sorted(e, key=lambda example: len(example.tokens))[-2 * size :] for e in self.judged]
        batches = (batch for examples in last for batch in evaluation_batches(examples, size))
        return max([of_updates, *(evaluation_bytes(self.sizes, shape_of(batch)) for batch in batches)])

    def changed(self, **fields: Any) -> Run:
        return replace(self, training=replace(self.training, **fields))

    @property
    def longest(self) -> int:
        return max((len(example.tokens) for e in (self.train, *self.judged) for example in e), default=0)

    def cut(self, tokens: int) -> Run:
        """As with --max-seq-length."""
        train, *judged = (
            [Example(e.tokens[:tokens], e.is_target[:tokens]) for e in examples]
            for examples in (self.train, *self.judged)
        )
        training = replace(self.training, max_seq_length=min(tokens, self.training.max_seq_length))
        return replace(self, train=train, judged=tuple(judged), training=training)


def require_memory(
    trainer: LoRATrainer, train: Sequence[Example], *evaluated: Sequence[Example]
) -> list[str]:
    """For training and evaluations; remarks on what is short, ValueError in one sentence if it cannot be."""
    return judged(Run(sizes_of(trainer.model), train, evaluated, trainer.training, trainer.step), limits())


def require_evaluation(model: CausalLM, examples: Sequence[Example], batch_size: int) -> list[str]:
    training = TrainConfig(iters=1, batch_size=batch_size)
    return judged(Run(sizes_of(model), (), (examples,), training), limits())


def require_answers(
    model: CausalLM, prompts: Sequence[Sequence[int]], max_tokens: int, rows: int = 1
) -> list[str]:
    """For reading the prompts, so many rows together, and writing answers; no flag makes a prompt shorter."""
    if not prompts:
        return []
    sizes = sizes_of(model)
    longest = sorted(prompts, key=len)[-rows:]
    of_one = Shape(1, len(longest[-1]), len(longest[-1]), 1)
    shortest = len(longest[0])
    together = Shape(len(longest), shortest, len(longest) * shortest, len(longest))
    more = len(longest[-1]) - shortest + max_tokens
    need = max(answer_bytes(sizes, of_one, max_tokens), answer_bytes(sizes, together, more))
    return verdict(f"the longest prompt, of {len(longest[-1])} tokens,", need, limits(), lambda _: "")


def judged(run: Run, found: Sequence[Limit]) -> list[str]:
    return verdict("the longest batch", run.need(), found, lambda limit: advice(run, limit))


def verdict(what: str, need: int, found: Sequence[Limit], advice_for: Callable[[int], str]) -> list[str]:
    """A remark where what is free is too little; ValueError where a hard limit is."""
    short = [limit for limit in found if need > limit.num_bytes]
    hard = [limit for limit in short if limit.is_hard]
    if hard:
        raise TooLittle(refusal(what, need, hard[0]) + advice_for(hard[0].num_bytes))
    return [
        f"{what} needs about {shown(need)} and {shown(limit.num_bytes)} is free{advice_for(limit.num_bytes)}"
        for limit in short
    ]


def advice(run: Run, limit: int) -> str:
    """`: --batch-size 1 would need 3.1 GiB, --grad-checkpoint 4.0 GiB`: each flag that lowers the need."""
    changes: dict[str, dict] = {}
    if run.training.batch_size > 1:
        changes["--batch-size 1"] = {"batch_size": 1}
    if run.train and not run.training.grad_checkpoint:
        changes["--grad-checkpoint"] = {"grad_checkpoint": True}
    needs = {flag: run.changed(**change).need() for flag, change in changes.items()}
    helping = [flag for flag in changes if needs[flag] < run.need()]
    frugal = run.changed(**{field: value for flag in helping for field, value in changes[flag].items()})
    every = " ".join(helping)
    if len(helping) > 1 and min(needs.values()) > limit:
        needs[every] = frugal.need()
    needs |= length_that_fits(run, limit, "") or length_that_fits(frugal, limit, every)
    helpful = [(flag, shown(need)) for flag, need in needs.items() if need < run.need()]
    named = [f"{flag} {'' if number else 'would need '}{size}" for number, (flag, size) in enumerate(helpful)]
    return ": " + ", ".join(named) if named else ""


def length_that_fits(run: Run, limit: int, flags: str) -> dict[str, int]:
    """The largest power of two that --max-seq-length may be, with its need; empty where there is none."""
    tokens = 1 << max(0, (run.longest - 1).bit_length() - 1)
    while tokens >= SHORTEST:
        if (need := run.cut(tokens).need()) <= limit:
            return {f"{flags} --max-seq-length {tokens}".strip(): need}
        tokens //= 2
    return {}


def largest_update(run: Run, need_of: Callable[[Shape], int]) -> int:
    """The need of the batch that needs most: found by its lengths, then made."""
    if not run.train or run.first_step >= run.training.iters:
        return 0
    lengths = [num_inputs(example) for example in run.train]
    targets = [sum(example.is_target[1:]) for example in run.train]

    def about(batch: Sequence[Row]) -> int:
        each = [sum(lengths[i] for i in row) for row in batch]
        width = bucket_size(max(1, *each), WIDTH_BUCKETS)
        computed = min(len(batch) * width, bucket_size(sum(each) + 1, KEPT_BUCKETS))
        return need_of(Shape(len(batch), width, computed, sum(targets[i] for row in batch for i in row)))

    make = make_packed_batch if run.training.batching == "packed" else make_plain_batch
    return need_of(shape_of(make(run.train, max(batches_of(run, lengths), key=about))))


def batches_of(run: Run, lengths: Sequence[int]) -> Iterator[list[Row]]:
    """The rows of every batch; of a run with too many of them, of a batch that is no smaller than any."""
    rows = rows_of(lengths, run.training)
    if (run.training.iters - run.first_step) * len(rows) > MANY:
        yield sorted(rows, key=lambda row: sum(lengths[i] for i in row))[-run.training.batch_size :]
        return
    for step in range(run.first_step, run.training.iters):
        yield from window_rows(step, rows, lengths, run.training)
