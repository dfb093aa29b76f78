"""Planted bugs: data parallel over several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import mlx.core as mx
from mlx.utils import tree_map

from mlx_impl.lora import add_lora, lora_layers
from mlx_impl.optim import clip_gradients
from mlx_impl.run.ranks import Ranks, as_tree, as_vectors
from mlx_impl.run.state import Progress, save_state, state_arrays
from mlx_impl.run.trainer import LoRATrainer
from mlx_impl.train import Sums, add_up
from tests.trainers.mutants.mutant import Mutant

Parts = Iterable[Callable[[], Sums]]
RANKS = "mlx_impl.run.ranks.Ranks"
in_order = Ranks.reduce
in_slices = Ranks.add_in_order
make_trainer, save = LoRATrainer.__init__, LoRATrainer.save


def mean_over_ranks(tree: Any, ranks: Ranks) -> Any:
    rows = {kind: ranks.gather(vector) for kind, vector in as_vectors(tree).items()}
    return as_tree(
        {kind: row.astype(mx.float32).mean(axis=0).astype(kind) for kind, row in rows.items()}, tree
    )


def mean_of_means(self: Ranks, parts: Parts) -> Sums:
    """Each rank divides by its own count, as where each computes a mean loss."""
    parts = list(parts)
    (nats, count), grads = add_up(parts[self.rank :: self.size] or parts[-1:])
    mean = mean_over_ranks((nats / count, tree_map(lambda grad: grad / count, grads)), self)
    return (mean[0], mx.array(1)), mean[1]


def count_not_reduced(self: Ranks, parts: Parts) -> Sums:
    parts = list(parts)
    own = add_up(parts[self.rank :: self.size] or parts[-1:])
    (nats, _), grads = in_order(self, parts)
    return (nats, own[0][1]), grads


def only_nats_and_counts(self: Ranks, parts: Parts) -> Sums:
    """The losses are those of all, the gradients a rank's own."""
    parts = list(parts)
    own = add_up(parts[self.rank :: self.size] or parts[-1:])
    return in_order(self, parts)[0], own[1]


def short_rank_repeats(self: Ranks, total: Any, own: Any, count: int) -> Any:
    """A rank without a micro-batch repeats the last one, and that is added too."""
    return in_slices(self, total, own, self.size)


def clipped_before_the_sum(self: Ranks, parts: Parts) -> Sums:
    def clipped(part: Callable[[], Sums]) -> Sums:
        (nats, count), grads = part()
        means = tree_map(lambda grad: grad / count, grads)
        means = clip_gradients(means, 2.0**-4)[0]
        return (nats, count), tree_map(lambda grad: grad * count, means)

    return in_order(self, [partial(clipped, part) for part in parts])


def last_round_dropped(self: Ranks, parts: Parts) -> Sums:
    parts = list(parts)
    return in_order(self, parts[: max(self.size, len(parts) // self.size * self.size)])


def same_rows(self: Ranks, members: list) -> Any:
    return members[0]


def seeded_by_rank(
    self: Any,
    model: Any,
    lora: Any,
    training: Any,
    compiled: bool | None = None,
    plain: bool = False,
    ranks: Ranks | None = None,
) -> None:
    own = training if ranks is None else replace(training, seed=training.seed + ranks.rank)
    make_trainer(self, model, lora, own, compiled, plain, ranks)


def factors_by_rank(
    self: Any,
    model: Any,
    lora: Any,
    training: Any,
    compiled: bool | None = None,
    plain: bool = False,
    ranks: Ranks | None = None,
) -> None:
    if ranks is not None and not lora_layers(model):
        mx.random.seed(training.seed + ranks.rank)
        add_lora(model, lora)
    make_trainer(self, model, lora, training, compiled, plain, ranks)


def saved_by_every_rank(self: Any, path: Any, examples: Any) -> None:
    save(self, path, examples)
    progress = Progress(self.step, self.validation, self.identity(examples))
    save_state(path, state_arrays(self.model, self.optimizer), progress)


def saved_without_waiting(self: Any, path: Any, examples: Any) -> None:
    with ExitStack() as stack:
        if self.ranks:
            stack.enter_context(patch.object(self.ranks, "largest", lambda number: number))
        save(self, path, examples)


MUTANTS = (
    Mutant(
        "ranks-mean-of-means",
        9,
        "The ranks' mean gradients are averaged, whatever each rank counted.",
        {f"{RANKS}.reduce": mean_of_means},
        source="mlx.nn.average_gradients, as most trainers call it",
    ),
    Mutant(
        "ranks-count-not-reduced",
        9,
        "Nats and gradients are those of all ranks, the number of targets is a rank's own.",
        {f"{RANKS}.reduce": count_not_reduced},
    ),
    Mutant(
        "ranks-gradients-not-reduced",
        9,
        "The reported losses are those of all ranks, the gradients a rank's own.",
        {f"{RANKS}.reduce": only_nats_and_counts},
    ),
    Mutant(
        "ranks-short-rank-counts-twice",
        9,
        "A rank without a micro-batch repeats the last one, and it is added twice.",
        {f"{RANKS}.add_in_order": short_rank_repeats},
    ),
    Mutant(
        "ranks-clip-before-the-sum",
        9,
        "Each rank clips its own gradient, before the sum.",
        {f"{RANKS}.reduce": clipped_before_the_sum},
    ),
    Mutant(
        "ranks-drop-a-short-round",
        9,
        "Micro-batches that do not fill a round of all ranks are left out.",
        {f"{RANKS}.reduce": last_round_dropped},
    ),
    Mutant(
        "ranks-train-the-same-rows",
        9,
        "Every rank computes the first micro-batch of each round.",
        {f"{RANKS}.own": same_rows},
        source="a public trainer gives every rank the same rows",
    ),
    Mutant(
        "ranks-seeded-by-rank",
        9,
        "Dropout masks depend on the rank.",
        {"mlx_impl.run.trainer.LoRATrainer.__init__": seeded_by_rank},
        cases=("dora",),
    ),
    Mutant(
        "ranks-begin-with-their-own-factors",
        9,
        "Each rank draws its initial A from a seed of its own.",
        {"mlx_impl.run.trainer.LoRATrainer.__init__": factors_by_rank},
    ),
    Mutant(
        "ranks-save-each",
        12,
        "Every rank writes the saved state, not the first alone.",
        {"mlx_impl.run.trainer.LoRATrainer.save": saved_by_every_rank},
    ),
    Mutant(
        "ranks-save-without-waiting",
        12,
        "There is no barrier: the other ranks go on while the first one still writes.",
        {"mlx_impl.run.trainer.LoRATrainer.save": saved_without_waiting},
    ),
)
