"""The ladder's own words: what blocks what, what is never a pass, and what the first divergence says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mlx_impl.config import TrainConfig
from mlx_impl.data import Batch
from tests.ladder.climb import climb
from tests.ladder.plugin import DEFAULT_TRAINER, Ladder
from tests.ladder.protocol import OPTIONAL, Dialect
from tests.ladder.summary import departures, summary_lines
from tests.trainers.minimal import MinimalTrainer
from tests.trainers.reference import ReferenceTrainer, with_pad_targets

pytestmark = pytest.mark.slow

README = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
RUNGS = range(1, 15)


@pytest.fixture(autouse=True)
def with_the_default_trainer(ladder: Ladder) -> None:
    """Of no interest to those who climb with their own."""
    if ladder.trainer != DEFAULT_TRAINER:
        pytest.skip("about the ladder itself")


class CountsPadding(ReferenceTrainer):
    """One padding target in each row, undeclared."""

    def loss(self, batch: Batch) -> tuple[float, int]:
        nats, num_targets = super().loss(batch)
        return nats, num_targets + len(batch.mask_BT)


class DeclaresPadding(ReferenceTrainer):
    """The same, declared and done throughout."""

    dialect = Dialect(pad_targets=1)


SMALLEST: Any = MinimalTrainer


class PadsOneTarget(MinimalTrainer):
    """One padding target in each padded row, counted throughout and not declared."""

    def loss(self, batch: Batch) -> Any:
        return SMALLEST.loss(self, padded(batch))

    def gradients(self, batch: Batch) -> Any:
        return SMALLEST.gradients(self, padded(batch))

    def train(self, windows: Any, training: TrainConfig) -> Any:
        return SMALLEST.train(self, [list(map(padded, window)) for window in windows], training)


def padded(batch: Batch) -> Batch:
    return batch._replace(mask_BT=with_pad_targets(batch.mask_BT, 1))


def is_not_implemented(*given: object) -> None:
    raise NotImplementedError


class MakesNoModel:
    """The seven members, and nothing behind them."""

    dialect = Dialect()
    __init__ = is_not_implemented
    logits = loss = gradients = train = factors = base = is_not_implemented


class AnswersNothing(MakesNoModel):
    """A model, every capability by name, and no answer."""

    def __init__(self, *given: object) -> None:
        pass


for name in set(OPTIONAL) - {"ops"}:
    setattr(AnswersNothing, name, is_not_implemented)


def name_of(trainer: type) -> str:
    return f"{__name__}:{trainer.__name__}"


def test_what_stands_on_a_failed_rung_is_blocked_and_what_is_judged_alone_is_not() -> None:
    """The count is wrong on rung 4: rungs 5 and 7 keep only what is fed the reference's values."""
    ladder = climb(name_of(CountsPadding), rungs=(3, 4, 7))
    outcomes = ladder.outcomes
    assert outcomes[3]["failed"] == 0 < outcomes[3]["passed"]
    assert outcomes[4]["failed"] > 0 and outcomes[4]["blocked"] == 0
    assert outcomes[7]["failed"] == 0 < outcomes[7]["blocked"] and outcomes[7]["passed"] > 0


def test_the_first_divergence_says_what_where_and_how_to_see_it_again() -> None:
    """Rung, test, expected and actual, and a command that names the trainer."""
    ladder = climb(name_of(CountsPadding), "-x", rungs=(4,))
    text = "\n".join(summary_lines(ladder))
    assert ladder.first_divergence is not None and ladder.first_divergence.rung == 4
    assert "first divergence: rung 4, loss: test_the_loss_equals_the_reference[untied]" in text
    assert "number of targets: expected 14, got 17" in text
    assert f"--trainer {name_of(CountsPadding)}" in text


def test_a_run_that_keeps_going_blocks_nothing() -> None:
    """For those who want to see everything."""
    ladder = climb(name_of(CountsPadding), "--keep-going", rungs=(4, 14))
    assert ladder.outcomes[14]["blocked"] == 0 < ladder.outcomes[14]["passed"]


def test_a_declared_departure_passes_and_is_printed() -> None:
    """Held to what it declares; the claims of the canonical dialect are not claimed."""
    ladder = climb(name_of(DeclaresPadding), rungs=(4,))
    assert ladder.first_divergence is None and ladder.outcomes[4]["not claimed"] > 0
    assert departures(ladder) == "pad_targets = 1 instead of 0"
    assert "judged as declared: pad_targets = 1 instead of 0" in list(summary_lines(ladder))


@pytest.mark.parametrize("trainer", [MakesNoModel, AnswersNothing])
def test_what_is_not_claimed_is_never_a_pass(trainer: type) -> None:
    """A trainer that implements nothing passes nothing, on any rung, and that is no success."""
    ladder = climb(name_of(trainer), rungs=RUNGS)
    assert set(ladder.outcomes) == set(RUNGS)
    assert all(set(counts) == {"not claimed"} for counts in ladder.outcomes.values())
    assert list(summary_lines(ladder))[-1] == "nothing was judged"
    assert ladder.exit_status != 0


def test_the_platform_alone_is_judged_without_a_trainer() -> None:
    """Rung 0 asks nothing of it."""
    ladder = climb(name_of(MakesNoModel), rungs=(0,))
    assert ladder.exit_status == 0 and ladder.outcomes[0]["passed"] > 0


def test_the_readme_shows_what_the_ladder_says() -> None:
    """Rung by rung and to the letter, but for the shares of tolerances, which are each machine's own."""
    ladder = climb(name_of(PadsOneTarget))
    shown = re.search(r"=+ ladder: my_adapter:MyTrainer =+\n(.*?)```", README, re.DOTALL)
    said = [line.replace(name_of(PadsOneTarget), "my_adapter:MyTrainer") for line in summary_lines(ladder)]
    print("\n".join(said))
    assert shown is not None
    assert list(map(without_share, shown[1].splitlines())) == list(map(without_share, said))


def without_share(line: str) -> str:
    return line.partition(" at most ")[0].rstrip()


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ("nonsense", "must be module:Class, or mlx_impl or plain or reference, got 'nonsense'"),
        ("tests.no_such:Trainer", "No module named 'tests.no_such'"),
        ("tests.trainers.reference:NoSuch", "has no attribute 'NoSuch'"),
        ("tests.ladder.cases:Case", "the class must have dialect, logits, loss, gradients, train"),
    ],
)
def test_a_wrong_trainer_is_one_sentence(trainer: str, message: str) -> None:
    """And no traceback."""
    with pytest.raises(RuntimeError, match=message) as info:
        climb(trainer)
    assert "Traceback" not in str(info.value) and str(info.value).startswith("ERROR: --trainer")
