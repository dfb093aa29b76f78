"""`--report-to`: what `LoRATrainer.fit` yields, sent to TensorBoard or to Weights & Biases as it comes.

Both are optional packages, imported only where they are asked for. mlx_impl/README.md shows the same in a
program of one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from ...train import StepRecord

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # by the names of the extras
PROJECT = "mlx-lora"
Values = Mapping[str, float]
Track = Callable[[int, Values], None]  # (step, values by their names)


def tracker_names(text: str | None) -> list[str]:
    """The names in the value of --report-to; ValueError for another one, and where a package is missing."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PACKAGES:
            raise ValueError(
                f"--report-to must be {' or '.join(PACKAGES)}, or both with a comma, got {text!r}"
            )
        try:
            import_module(PACKAGES[name])
        except ImportError:
            raise ValueError(
                f"--report-to {name} needs a package: python -m pip install {PACKAGES[name]}"
            ) from None
    return list(dict.fromkeys(names))


@contextmanager
def open_trackers(
    names: list[str], folder: Path, settings: dict[str, Any], project: str | None, first_step: int
) -> Iterator[Track]:
    """Within the block values can be sent to all of them; a resumed run goes on after `first_step`."""
    with ExitStack() as stack:
        opened = [stack.enter_context(OPENERS[name](folder, settings, project, first_step)) for name in names]

        def track(step: int, values: Values) -> None:
            for send in opened:
                send(step, values)

        yield track


@contextmanager
def tensorboard(folder: Path, settings: dict[str, Any], _: str | None, first_step: int) -> Iterator[Track]:
    """Event files in RUN/tensorboard. Steps that a stopped run did after its last save are dropped."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(
        str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None
    ) as writer:
        writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()))

        def track(step: int, values: Values) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield track


@contextmanager
def wandb(folder: Path, settings: dict[str, Any], project: str | None, _: int) -> Iterator[Track]:
    """A run of the project; what is not sent is kept in RUN/wandb."""
    import wandb

    run = wandb.init(project=project or PROJECT, name=folder.name, dir=str(folder), config=settings)

    def track(step: int, values: Values) -> None:
        run.log(dict(values), step=step)

    try:
        yield track
    finally:
        run.finish()


OPENERS = {"tensorboard": tensorboard, "wandb": wandb}


def values_of(record: StepRecord) -> Values:
    """What is drawn of a step."""
    return {
        "train/loss": record.loss_nats,
        "train/grad_norm": record.grad_norm,
        "train/learning_rate": record.learning_rate,
        "train/tokens_per_second": record.num_tokens / max(record.seconds, 1e-9),
        "train/peak_gib": record.peak_bytes / 2**30,
    }
