"""Known bugs of the optimizer: Adam's formula, weight decay, LoRA+'s rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlx_impl.config import TrainConfig
from tests.lora_ladder.signatures import Hypothesis, Signature, of_dialect, of_runs
from tests.trainers.reference import Run


@dataclass(frozen=True)
class Adam:
    """AdamW's formula with a mistake; the defaults have none."""

    late: int = 0  # the bias correction counts updates from 1 + late
    corrected: tuple[bool, bool] = (True, True)  # the first and the second moment
    eps_at: str = "end"  # or "before the correction", "in the root"
    decay: str = "decoupled"  # or "l2", "after", "without the rate", "none"
    forgets: bool = False  # moments begin at 0 in every update; the count of updates goes on
    first_moment_only: bool = False

    def step(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        """One update of one parameter."""
        (b1, b2), lr, eps, wd = group["betas"], group["lr"], group["eps"], group["weight_decay"]
        assert p.grad is not None
        g = p.grad + wd * p if self.decay == "l2" else p.grad
        t = state["t"] = state.get("t", 0) + 1
        zero = torch.zeros_like(p)
        m, v = (zero if self.forgets else state.get(name, zero) for name in "mv")
        state["m"], state["v"] = m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g.square()
        if self.decay in ("decoupled", "without the rate"):
            p -= (lr if self.decay == "decoupled" else 1.0) * wd * p
        p -= lr * self.direction(m, v, eps, [1 - b ** (t + self.late) for b in (b1, b2)])
        if self.decay == "after":
            p -= lr * wd * p

    def direction(self, m: Tensor, v: Tensor, eps: float, corrections: list[float]) -> Tensor:
        c1, c2 = (c if is_on else 1.0 for c, is_on in zip(corrections, self.corrected, strict=True))
        if self.eps_at == "before the correction":
            return m / c1 * c2**0.5 / (v.sqrt() + eps)
        return m / c1 / ((v / c2 + eps).sqrt() if self.eps_at == "in the root" else (v / c2).sqrt() + eps)


def adam(**mistake: Any) -> Hypothesis:
    rule = Adam(**mistake)

    def change(trainer: Any, run: Run, training: TrainConfig) -> None:
        states: dict[int, dict[str, Any]] = {}

        @torch.no_grad()
        def step() -> None:
            for group in run.optimizer.param_groups:
                for p in group["params"]:
                    rule.step(p, group, states.setdefault(id(p), {}))

        if training.optimizer == "adamw":
            run.optimizer.step = step  # type: ignore[assignment]

    return of_runs(change)


def groups(change: Callable[[dict[str, Any], TrainConfig], object]) -> Hypothesis:
    """Other numbers in the optimizer's groups."""

    def changed(trainer: Any, run: Run, training: TrainConfig) -> None:
        for group in run.optimizer.param_groups:
            change(group, training)

    return of_runs(changed)


def with_betas(*betas: float) -> Hypothesis:
    return groups(lambda group, training: group.update(betas=betas) if "betas" in group else None)


def with_eps(eps: float) -> Hypothesis:
    return groups(lambda group, training: group.update(eps=eps) if "eps" in group else None)


def with_decay(decay: float, *kinds: str) -> Hypothesis:
    """Weight decay times a number, in these optimizers."""

    def change(group: dict[str, Any], training: TrainConfig) -> None:
        if training.optimizer in kinds:
            group["weight_decay"] *= decay

    return groups(change)


def rates(of_a_and_b: Callable[[float], tuple[float, float]]) -> Hypothesis:
    """Other multiples of the learning rate for A and for the other factors, from LoRA+'s ratio."""

    def change(trainer: Any, run: Run, training: TrainConfig) -> None:
        peaks: list[float | Tensor] = [
            training.learning_rate * by for by in of_a_and_b(training.loraplus_lr_ratio)
        ]
        for group, peak, share in zip(
            run.optimizer.param_groups, peaks, run.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = peak * share(run.schedule.last_epoch)
        run.schedule.base_lrs = peaks

    return of_runs(change)


def decay_without_the_rate(trainer: Any, run: Run, training: TrainConfig) -> None:
    """SGD's p (1 - decay) - rate * g, where L2 means p (1 - rate * decay) - rate * g."""
    right = run.optimizer.step

    @torch.no_grad()
    def step() -> None:
        for group in run.optimizer.param_groups:
            for p in group["params"]:
                p *= 1 - training.weight_decay
        right()

    if training.optimizer == "sgd" and training.weight_decay:
        for group in run.optimizer.param_groups:
            group["weight_decay"] = 0.0
        run.optimizer.step = step  # type: ignore[assignment]


def with_momentum(momentum: float, nesterov: bool = False) -> Hypothesis:
    return groups(
        lambda group, training: (
            group.update(momentum=momentum, nesterov=nesterov) if training.optimizer == "sgd" else None
        )
    )


def known(name: str, sentence: str, hypothesis: Hypothesis, link: str = "", dialect: str = "") -> Signature:
    return Signature(name, 8, sentence, hypothesis, link, dialect)


BIAS = "tests/traps/test_trap_adam_bias.py"

SIGNATURES = [
    known(
        "no bias correction",
        "Adam without bias correction, MLX's default",
        of_dialect(bias_correction=False),
        BIAS,
        "bias_correction = False",
    ),
    known("bias correction one late", "Adam's bias correction counts updates from 2", adam(late=1), BIAS),
    known(
        "first moment not corrected",
        "Adam corrects the second moment alone",
        adam(corrected=(False, True)),
        BIAS,
    ),
    known(
        "second moment not corrected",
        "Adam corrects the first moment alone",
        adam(corrected=(True, False)),
        BIAS,
    ),
    known(
        "eps before the correction",
        "Adam adds eps before the bias correction of the second moment",
        adam(eps_at="before the correction"),
        "transformers#35504",
    ),
    known("eps in the root", "Adam adds eps under the root", adam(eps_at="in the root")),
    *(
        known(f"eps {eps:g}", f"Adam's eps is {eps:g}, not 1e-8", with_eps(eps))
        for eps in (1e-5, 1e-6, 1e-7, 1e-10, 0.0)
    ),
    *(
        known(f"betas {betas}", f"Adam's betas are {betas}, not (0.9, 0.999)", with_betas(*betas))
        for betas in ((0.9, 0.95), (0.9, 0.98), (0.9, 0.99), (0.999, 0.9), (0.95, 0.999), (0.5, 0.999))
    ),
    known(
        "decay as L2",
        "weight decay is added to the gradient and goes through the moments: Adam, not AdamW",
        adam(decay="l2"),
    ),
    known(
        "decay after the update", "AdamW decays the weights after the update, not before", adam(decay="after")
    ),
    known(
        "decay without the rate",
        "AdamW's weight decay is not multiplied by the learning rate",
        adam(decay="without the rate"),
    ),
    known("decay ignored", "weight_decay is ignored", with_decay(0.0, "adamw", "sgd")),
    known("decay ignored by AdamW", "AdamW ignores weight_decay", with_decay(0.0, "adamw")),
    known("decay ignored by SGD", "SGD ignores weight_decay", with_decay(0.0, "sgd")),
    known("decay twice", "weight decay is applied twice", with_decay(2.0, "adamw", "sgd")),
    known(
        "SGD's decay without the rate",
        "SGD's weight decay is not multiplied by the learning rate",
        of_runs(decay_without_the_rate),
    ),
    known(
        "moments forgotten",
        "Adam's moments begin at 0 in every update, and the count of updates goes on",
        adam(forgets=True),
    ),
    known("momentum", "SGD has momentum 0.9", with_momentum(0.9)),
    known("Nesterov's momentum", "SGD has Nesterov's momentum of 0.9", with_momentum(0.9, True)),
    known(
        "LoRA+ on A",
        "LoRA+'s ratio multiplies the learning rate of A, not that of B",
        rates(lambda ratio: (ratio, 1.0)),
        "Hayou et al. 2024, eq. 5",
    ),
    known(
        "LoRA+ on both",
        "LoRA+'s ratio multiplies the learning rates of A and B",
        rates(lambda ratio: (ratio, ratio)),
        "Hayou et al. 2024, eq. 5",
    ),
    known("LoRA+ ignored", "loraplus_lr_ratio is ignored", rates(lambda ratio: (1.0, 1.0)), "peft#3503"),
    known(
        "LoRA+ slows A down",
        "LoRA+ divides the learning rate of A by the ratio; B has the configured one",
        rates(lambda ratio: (1 / ratio, 1.0)),
        "Hayou et al. 2024, eq. 5",
    ),
]
