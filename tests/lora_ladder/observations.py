"""What is observed of a trainer to find the culprit, from simple to composed.

An observation is an act on a case, as the rungs judge it. A family holds what shows one part of a trainer:
its logits, its loss, its gradients, its frozen weights, its updates. All rows, settings and rates are small,
so that a family takes a second. Each is named as the report names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import methodcaller
from typing import Any

import numpy as np

from mlx_impl.config import LoRAConfig, TrainConfig
from mlx_impl.data import Batch
from tests.lora_ladder.cases import (
    ARCHITECTURES,
    BIASED_DORA,
    LORA,
    SPEC,
    VARIANTS,
    Case,
    make_batch,
    make_factors,
    make_weights,
    named_case,
    random_rows,
    rows_of,
)
from tests.lora_ladder.judge import Act
from tests.lora_ladder.protocol import Arrays

LARGE = "real vocabulary"  # takes longer than all the other cases together
SGD = TrainConfig(iters=3, learning_rate=2.0**-5, optimizer="sgd")
ADAMW = TrainConfig(iters=3, learning_rate=2.0**-7)
SCHEDULED = replace(SGD, iters=5, warmup_steps=2)  # of an even decay a cosine is half-way when a line is
DROPOUT = 0.25
TINY = 2.0**-22  # times B: Adam's eps of 1e-8 then matters in A's update


@dataclass(frozen=True)
class Observation:
    """An act on a case; `num_updates` lengthens the longest sum."""

    name: str
    case: Case
    act: Act
    num_updates: int = 1
    needs: str = ""  # a capability
    instead_of: str = ""  # the observation that this one stands in for, where that is not claimed

    @property
    def longest_sum(self) -> int:
        return self.num_updates * self.case.longest_sum


def of_logits() -> list[Observation]:
    """The logits of every small architecture and variant, and without an adapter."""
    tokens_BT = named_case("untied").batch.inputs_BT
    names = [name for name in (*ARCHITECTURES, *list(VARIANTS)[1:], BIASED_DORA) if name != LARGE]

    def act(trainer: Any) -> Arrays:
        return {"logits": trainer.logits(tokens_BT)}

    bare = [
        Observation("without an adapter", named_case("untied").bare(), act),
        Observation("qkv bias without an adapter", named_case("qkv bias").bare(), act),
    ]
    return [*bare, *(Observation(name, named_case(name), act) for name in names)]


def batches(case: Case) -> dict[str, Batch]:
    """Rows of unequal length; a row without a target; more padding; a real token 0; one row."""
    rows, prompts = random_rows(case.spec.vocab_size, (14, 6, 11)), (5, 3, 9)
    with_zero = [[*row[:-2], 0, row[-1]] for row in rows]
    return {
        "one row": make_batch(rows[:1], prompts[:1]),
        "rows of unequal length": make_batch(rows, prompts),
        "rows with more padding": make_batch(rows, prompts, width=20),
        "a row without a target": make_batch(rows, (5, 6, 9)),
        "a real token 0": make_batch(with_zero, prompts),
        "the whole text as target": make_batch(rows, (1, 1, 1)),
    }


def of_loss() -> list[Observation]:
    """The sum of nats and the number of targets; the mean over a data set."""
    case = named_case("untied")

    def loss(batch: Batch) -> Act:
        def act(trainer: Any) -> Arrays:
            nats, num_targets = trainer.loss(batch)
            return {"nats": np.array(nats), "number of targets": np.array(float(num_targets))}

        return act

    alone = [rows_of(case.batch, [row]) for row in (0, 1, 2)]
    found = [Observation(name, case, loss(batch)) for name, batch in batches(case).items()]
    return [
        *found,
        Observation(
            "a data set", case, lambda t: {"mean nats": np.array(t.evaluate(alone))}, needs="evaluate"
        ),
    ]


def of_gradients() -> list[Observation]:
    """Every factor's gradient, in batches of other target counts and kinds of adapters."""
    case = named_case("untied")
    found = [
        Observation(name, case, methodcaller("gradients", batch)) for name, batch in batches(case).items()
    ]
    others = [named_case(name) for name in ("rslora", "patterns", "dora")]
    return [*found, *(Observation(one.name, one, lambda t: t.gradients(case.batch)) for one in others)]


def of_base() -> list[Observation]:
    """The frozen weights after two updates with weight decay."""

    def act(training: TrainConfig, case: Case) -> Act:
        def trained(trainer: Any) -> Arrays:
            trainer.train([[case.batch]] * 2, training)
            return trainer.base()

        return trained

    return [
        Observation(f"{training.optimizer}, {name}", case, act(training, case), 2)
        for name, case in {"untied": one_layer(), "qkv bias": one_layer(qkv_bias=True)}.items()
        for training in (replace(SGD, weight_decay=0.1), replace(ADAMW, weight_decay=0.1))
    ]


def windows_of_one(case: Case, num_updates: int) -> list[list[Batch]]:
    """One batch an update, with other target counts each time."""
    rows = random_rows(case.spec.vocab_size, (9, 6, 8))
    prompts = ((3, 2, 5), (7, 1, 4), (2, 4, 3))
    return [[make_batch(rows, prompts[update % 3])] for update in range(num_updates)]


def windows_of_many(case: Case) -> list[list[Batch]]:
    """Updates of three, two and one micro-batches with unequal target counts."""
    one, two, three = (rows_of(case.batch, [row]) for row in range(3))
    return [[one, two, three], [three, one], [two]]


def trained(windows: list[list[Batch]], training: TrainConfig, how: str = "train") -> Act:
    """The reference has one way to train, `train`."""

    def act(trainer: Any) -> Arrays:
        losses = (getattr(trainer, how) if hasattr(trainer, how) else trainer.train)(windows, training)
        return {"losses": np.array(losses), **trainer.factors()}

    return act


def one_layer(lora: LoRAConfig = LORA, **switches: Any) -> Case:
    """Half as large as the other cases, because a run takes longer than a forward pass."""
    spec = replace(SPEC, num_hidden_layers=1, **switches)
    weights = make_weights(spec)
    return Case(f"one layer {lora} {switches}", spec, lora, weights, make_factors(spec, lora, weights))


TrainingRun = tuple[Case, list[list[Batch]], TrainConfig]
ALSO_BY_ADAMW = (
    "sgd, LoRA+",
    "sgd, linear schedule",
    "sgd, warmup and cosine",
    "sgd, accumulation",
    "sgd, accumulation and clipping",
    "sgd, accumulation and schedule",
)


def trainings() -> dict[str, TrainingRun]:
    """From one update of SGD to AdamW with gradients near 0; the simplest ones first."""
    case, dora = one_layer(), one_layer(VARIANTS["dora"])
    tiny = {n: v * np.float32(TINY if n.endswith("lora_b") else 1) for n, v in case.factors.items()}
    one, some, five = (windows_of_one(case, n) for n in (1, 3, 5))
    many, accumulated = windows_of_many(case), replace(SGD, grad_accumulation_steps=3)
    return {
        "sgd, first update": (case, one, SGD),
        "sgd, three updates": (case, some, SGD),
        "sgd, DoRA": (dora, one, SGD),
        "sgd, weight decay": (case, some, replace(SGD, weight_decay=2.0)),
        "sgd, clipping": (case, some, replace(SGD, max_grad_norm=2.0**-4)),
        "sgd, a limit not reached": (case, one, replace(SGD, max_grad_norm=2.0**10)),
        "sgd, LoRA+": (case, some, replace(SGD, loraplus_lr_ratio=4.0)),
        "sgd, linear schedule": (case, some, replace(SCHEDULED, warmup_steps=0, lr_schedule="linear")),
        "sgd, warmup and cosine": (case, five, replace(SCHEDULED, lr_schedule="cosine")),
        "sgd, accumulation": (case, many, accumulated),
        "sgd, accumulation and clipping": (case, many, replace(accumulated, max_grad_norm=2.0**-4)),
        "sgd, accumulation and schedule": (case, many, replace(accumulated, lr_schedule="linear")),
        "adamw, first update": (case, one, ADAMW),
        "adamw, three updates": (case, some, ADAMW),
        "adamw, weight decay": (case, some, replace(ADAMW, weight_decay=2.0)),
        "adamw, clipping": (case, some, replace(ADAMW, max_grad_norm=2.0**-4)),
        "adamw, gradients near 0": (replace(case, factors=tiny), some, ADAMW),
    }


def of_updates(how: str = "train", names: Sequence[str] = ()) -> list[Observation]:
    """Losses and factors after a run, by this way to train."""
    chosen = {name: run for name, run in trainings().items() if name in names or not names}
    needs = "" if how == "train" else how

    def observed(name: str, run: TrainingRun, instead_of: str = "") -> Observation:
        case, windows, training = run
        return Observation(
            name, case, trained(windows, training, how), len(windows), needs, instead_of=instead_of
        )

    return [
        *(observed(name, run) for name, run in chosen.items()),
        *(
            observed(name.replace("sgd", "adamw"), by_adamw(chosen[name]), name)
            for name in ALSO_BY_ADAMW
            if name in chosen
        ),
    ]


def by_adamw(run: TrainingRun) -> TrainingRun:
    """For a trainer that has no SGD."""
    case, windows, training = run
    return case, windows, replace(training, optimizer="adamw", learning_rate=ADAMW.learning_rate)


def of_given_masks() -> list[Observation]:
    """Two updates with dropout, whose masks are given."""

    def act(trainer: Any) -> Mapping[str, Any]:
        case = named_case("untied")
        rng, shape = np.random.default_rng(29), case.batch.inputs_BT.shape
        keep = {
            name.removesuffix(".lora_a"): rng.random((*shape, a_IR.shape[0])) >= DROPOUT
            for name, a_IR in case.factors.items()
            if name.endswith("lora_a")
        }
        trainer.set_dropout_masks(keep)
        return trained([[case.batch]] * 2, replace(SGD, iters=2))(trainer)

    cases = [named_case(name).with_dropout(DROPOUT) for name in ("untied", "dora")]
    return [Observation(f"sgd, {c.name}", c, act, 2, "set_dropout_masks") for c in cases]


@dataclass(frozen=True)
class Family:
    """Observations of one part of a trainer, and the signatures that may explain them."""

    what: str
    observations: Callable[[], list[Observation]]
    rungs: tuple[int, ...]  # of its signatures
    first_rung: int = 0  # it is not looked at where a lower rung failed, because it takes longer


OTHER_WAYS = (
    "sgd, three updates",
    "sgd, clipping",
    "sgd, LoRA+",
    "sgd, warmup and cosine",
    "sgd, accumulation",
    "adamw, three updates",
)
OF_UPDATES = (5, 7, 8, 9, 10)
FAMILIES = [
    Family("logits", of_logits, (2, 4)),
    Family("loss", of_loss, (2, 4, 5)),
    Family("gradients", of_gradients, (5, 6)),
    Family("frozen weights", of_base, (7,), 7),
    Family("updates", of_updates, OF_UPDATES, 7),
    Family("compiled updates", lambda: of_updates("train_compiled", OTHER_WAYS), OF_UPDATES, 10),
    Family("recomputed updates", lambda: of_updates("train_checkpointed", OTHER_WAYS), OF_UPDATES, 10),
    Family("updates with given dropout masks", of_given_masks, (10,), 10),
]
