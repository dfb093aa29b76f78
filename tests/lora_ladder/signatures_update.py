"""Known bugs of an update: which gradient it takes, which factors it moves, which loss it reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mlx_impl.config import TrainConfig
from reference.train import batch_loss
from tests.lora_ladder.signatures import Hypothesis, of_members, of_runs
from tests.lora_ladder.signatures_accumulation import (
    Grads,
    known,
    mean,
    scaled,
    total,
    updating,
    with_gradient,
)
from tests.trainers.reference import Run


def remembering(choose: Callable[[list[Grads]], Grads]) -> Hypothesis:
    """The gradient of an update out of those of all updates so far."""

    def change(trainer: Any, run: Run, training: TrainConfig) -> None:
        seen: list[Grads] = []
        right = run.optimizer.step

        def step() -> None:
            seen.append([parameter.grad.clone() for parameter in run.trained])
            for parameter, grad in zip(run.trained, choose(seen), strict=True):
                parameter.grad = grad.clone()
            right()

        run.optimizer.step = step  # type: ignore[assignment]

    return of_runs(change)


def added(seen: list[Grads]) -> Grads:
    return [torch.stack(grads).sum(0) for grads in zip(*seen, strict=True)]


def losses_after(self: Any, train: Any, windows: Any, training: TrainConfig) -> list[float]:
    """Each update's loss on its own window, after the update."""
    run = self.begin(training)
    found = []
    for window in windows:
        tensors = list(map(self.tensors, window))
        run.update(self.model, tensors)
        with torch.no_grad():
            sums = [batch_loss(self.model, batch) for batch in tensors]
        found.append(float(sum(nats for nats, _ in sums) / sum(count for _, count in sums)))
    return found


def in_turn(self: Any, train: Any, windows: Any, training: TrainConfig) -> list[float]:
    """The factors stay: nothing is trained."""
    before = self.factors()
    rates = train(windows[:1], training)
    state = {name: torch.tensor(value) for name, value in before.items()}
    self.model.load_state_dict(state, strict=False)
    with torch.no_grad():
        sums = [[batch_loss(self.model, self.tensors(batch)) for batch in window] for window in windows[1:]]
    means = [float(sum(n for n, _ in one) / sum(c for _, c in one)) for one in sums]
    return [*rates, *means]


def only(is_trained: Callable[[str], bool]) -> Hypothesis:
    """The other factors stay as they are; their gradients count in the norm that is clipped."""

    def change(trainer: Any, run: Run, training: TrainConfig) -> None:
        parameters = trainer.model.named_parameters()
        others = [p for name, p in parameters if p.requires_grad and not is_trained(name)]
        right = run.optimizer.step

        @torch.no_grad()
        def step() -> None:
            before = [p.clone() for p in others]
            right()
            for p, value in zip(others, before, strict=True):
                p.copy_(value)

        run.optimizer.step = step  # type: ignore[assignment]

    return of_runs(change)


def all_but(kind: str) -> Hypothesis:
    return only(lambda name: not name.endswith(kind))


SIGNATURES = [
    known(
        "update by the sum",
        8,
        "the update takes the gradient of the sum over targets, not of their mean",
        with_gradient(total),
        "tests/traps/test_trap_cross_entropy.py",
    ),
    known("update doubled", 8, "the update takes twice the gradient", scaled(lambda *_: 2.0)),
    known("update upwards", 8, "the update goes up the gradient, not down", scaled(lambda *_: -1.0)),
    known(
        "gradients not reset",
        8,
        "gradients are not reset: those of earlier updates are added",
        remembering(added),
    ),
    known(
        "gradients one update late",
        9,
        "each update takes the gradient of the update before",
        remembering(lambda seen: seen[max(0, len(seen) - 2)]),
    ),
    known(
        "loss after the update",
        8,
        "the reported loss is that after the update",
        of_members(train=losses_after),
    ),
    known(
        "sum of nats reported",
        8,
        "the reported loss is the sum of nats, not their mean",
        updating(lambda parts, _: mean(parts), reported=lambda parts: sum(part[0] for part in parts)),
    ),
    known(
        "nothing trains",
        7,
        "no factor changes: the update is lost",
        of_members(train=in_turn),
        "tests/traps/test_trap_in_place.py",
    ),
    *(
        known(
            f"{what} not trained",
            7,
            f"{what} is not trained",
            all_but(kind),
        )
        for kind, what in (("lora_a", "A"), ("lora_b", "B"), ("magnitude", "DoRA's magnitude"))
    ),
]
