"""The report: which tests are blocked, what never counts as passed, and how a divergence is reported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mlx_impl.config import TrainConfig
from mlx_impl.data import Batch
from tests.lora_ladder.climb import RUNGS, climb
from tests.lora_ladder.here import DEFAULT_TRAINER
from tests.lora_ladder.plugin import Ladder
from tests.lora_ladder.protocol import OPTIONAL, Dialect
from tests.lora_ladder.summary import departures, summary_lines
from tests.nightly import mostly_at_night
from tests.trainers.minimal import MinimalTrainer
from tests.trainers.reference import ReferenceTrainer, with_pad_targets

pytestmark = pytest.mark.slow

FEW = ("untied",)  # cases, where one is enough to see what the report says
README = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def with_the_default_trainer(ladder: Ladder) -> None:
    """Skipped when another trainer is judged: these tests are about the ladder itself."""
    if ladder.trainer != DEFAULT_TRAINER:
        pytest.skip("about the ladder itself")


class CountsPadding(ReferenceTrainer):
    """Counts one padding target in each row and does not declare it."""

    def loss(self, batch: Batch) -> tuple[float, int]:
        nats, num_targets = super().loss(batch)
        return nats, num_targets + len(batch.mask_BT)


class DeclaresPadding(ReferenceTrainer):
    """Counts one padding target in each row everywhere, and declares it."""

    dialect = Dialect(pad_targets=1)


SMALLEST: Any = MinimalTrainer


class PadsOneTarget(MinimalTrainer):
    """Counts one padding target in each padded row everywhere, and does not declare it."""

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
    """The seven members, none of them implemented."""

    dialect = Dialect()
    __init__ = is_not_implemented
    logits = loss = gradients = train = factors = base = is_not_implemented


class AnswersNothing(MakesNoModel):
    """Every capability is present, none is implemented, but a trainer can be made."""

    def __init__(self, *given: object) -> None:
        pass


for name in set(OPTIONAL) - {"ops"}:
    setattr(AnswersNothing, name, is_not_implemented)


def name_of(trainer: type) -> str:
    return f"{__name__}:{trainer.__name__}"


def test_a_failed_rung_blocks_the_rungs_above_it_but_not_tests_that_are_judged_alone() -> None:
    """The target count is wrong at rung 5, so rung 8 runs only the tests that get the reference's values."""
    ladder = climb(name_of(CountsPadding), rungs=(4, 5, 8), cases=FEW)
    outcomes = ladder.outcomes
    assert outcomes[4]["failed"] == 0 < outcomes[4]["passed"]
    assert outcomes[5]["failed"] > 0 and outcomes[5]["blocked"] == 0
    assert outcomes[8]["failed"] == 0 < outcomes[8]["blocked"] and outcomes[8]["passed"] > 0


def test_the_first_divergence_is_reported_with_values_and_a_replay_command() -> None:
    """The report shows rung, test, expected and actual value, and a command that names the trainer."""
    ladder = climb(name_of(CountsPadding), "-x", rungs=(5,))
    text = "\n".join(summary_lines(ladder))
    assert ladder.first_divergence is not None and ladder.first_divergence.rung == 5
    assert "first divergence: rung 5, loss: test_the_loss_equals_the_reference[untied]" in text
    assert "number of targets: expected 14, got 17" in text
    assert f"--trainer {name_of(CountsPadding)}" in text


def test_a_run_that_keeps_going_blocks_nothing() -> None:
    """With --keep-going, every rung is judged."""
    ladder = climb(name_of(CountsPadding), "--keep-going", rungs=(5, 7), cases=FEW)
    assert ladder.outcomes[7]["blocked"] == 0 < ladder.outcomes[7]["passed"]


def test_a_declared_departure_passes_and_is_printed() -> None:
    """The trainer is judged by what it declares; claims about the canonical dialect are not claimed."""
    ladder = climb(name_of(DeclaresPadding), rungs=(5,), cases=FEW)
    assert ladder.first_divergence is None and ladder.outcomes[5]["not claimed"] > 0
    assert departures(ladder) == "pad_targets = 1 instead of 0"
    assert "judged as declared: pad_targets = 1 instead of 0" in list(summary_lines(ladder))


@pytest.mark.parametrize(
    ("trainer", "rungs"),
    mostly_at_night([(AnswersNothing, RUNGS), (MakesNoModel, [5, 12, 17]), (MakesNoModel, RUNGS)], 2),
)
def test_not_claimed_never_counts_as_passed(trainer: type, rungs: list[int]) -> None:
    """A trainer that implements nothing passes nothing at any rung, and the exit status is not 0."""
    ladder = climb(name_of(trainer), rungs=rungs, cases=FEW)
    assert set(ladder.outcomes) == set(rungs)
    assert all(set(counts) == {"not claimed"} for counts in ladder.outcomes.values())
    assert list(summary_lines(ladder))[-1] == "nothing was judged"
    assert ladder.exit_status != 0


def test_the_platform_alone_is_judged_without_a_trainer() -> None:
    """Rung 0 does not use the trainer."""
    ladder = climb(name_of(MakesNoModel), rungs=(0,))
    assert ladder.exit_status == 0 and ladder.outcomes[0]["passed"] > 0


def test_the_readme_shows_what_the_ladder_says() -> None:
    """Letter by letter, except for the shares of tolerances, which depend on the machine."""
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
        ("tests.lora_ladder.cases:Case", "the class must have dialect, logits, loss, gradients, train"),
    ],
)
def test_a_wrong_trainer_is_refused_in_one_sentence(trainer: str, message: str) -> None:
    """Without a traceback."""
    with pytest.raises(RuntimeError, match=message) as info:
        climb(trainer)
    assert "Traceback" not in str(info.value) and str(info.value).startswith("ERROR: --trainer")
