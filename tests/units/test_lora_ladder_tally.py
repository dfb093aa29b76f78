"""What `lora-ladder` says was judged and was not, and what is left of an interrupted climb."""

from __future__ import annotations

import io
import json
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.lora_ladder.command import main
from tests.lora_ladder.outcome import Claim
from tests.lora_ladder.plugin import Ladder
from tests.lora_ladder.progress import Progress
from tests.lora_ladder.protocol import Batch
from tests.lora_ladder.tally import offered_but_not_judged, reason_lines, spans, what_was_judged
from tests.trainers.reference import ReferenceTrainer

HERE = __name__
LOSS = "test_05_loss.py::test_"
CLAIMS = (
    "test_02_layer.py::test_the_trainable_count_is_rank_times_inputs_plus_outputs[untied]",
    f"{LOSS}the_loss_equals_the_reference[untied]",
    f"{LOSS}a_hand_worked_example",
)
NORM = "test_08_step.py::test_the_norm_before_clipping_is_reported"


class Stopped(ReferenceTrainer):
    """Its first loss is interrupted."""

    with_signal = signal.SIGTERM

    def loss(self, batch: Batch) -> tuple[float, int]:
        signal.raise_signal(self.with_signal)
        return super().loss(batch)


class StoppedByHand(Stopped):
    with_signal = signal.SIGINT


class StoppedInTheCulprit(ReferenceTrainer):
    """Its loss is wrong, and the search for the culprit, which asks for logits first, is interrupted."""

    loss_of_logits = None  # type: ignore[assignment]

    def loss(self, batch: Batch) -> tuple[float, int]:
        nats, num_targets = super().loss(batch)
        return nats, num_targets + 1

    def logits(self, tokens_BT: Any) -> Any:
        raise KeyboardInterrupt


class WithoutNorms(ReferenceTrainer):
    def gradient_norms(self, windows: Any, training: Any) -> list[float]:
        raise NotImplementedError("no clipping here")


def climbed(trainer: type, folder: Path, *claims: str) -> tuple[int, dict[str, Any], str]:
    files = [folder / "climb.json", folder / "climb.html"]
    status = main([f"{HERE}:{trainer.__name__}", *claims, "--json", str(files[0]), "--html", str(files[1])])
    return status, json.loads(files[0].read_text()), files[1].read_text()


@pytest.mark.parametrize("trainer", [Stopped, StoppedByHand])
def test_an_interrupted_climb_writes_its_reports_and_names_the_claim_that_was_running(
    trainer: type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By SIGTERM as by Ctrl-C; what was judged before stays, and its verdict is no other one."""
    before = signal.getsignal(signal.SIGTERM)
    status, record, page = climbed(trainer, tmp_path, *CLAIMS)
    out = capsys.readouterr().out
    assert status == 130 and record["verdict"] == "interrupted" and record["counts"] == {"passed": 1}
    assert record["interrupted"] == "the loss equals the reference [untied]"
    assert "was interrupted (the loss equals the reference [untied])" in page
    assert "interrupted while test_05_loss.py::test_the_loss_equals_the_reference[untied] was judged" in out
    assert "no divergence in what was judged: 1 claim of rung 2" in out
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupted_search_for_the_culprit_keeps_the_divergence(tmp_path: Path) -> None:
    status, record, _ = climbed(StoppedInTheCulprit, tmp_path, CLAIMS[1])
    assert status == 130 and record["verdict"] == "first divergence"
    assert record["interrupted"] == "between two claims"
    assert not any("culprit" in line for line in record["summary"])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("screen", "is_shown"), [(Terminal(), True), (io.StringIO(), False)])
def test_a_terminal_shows_the_claim_that_is_judged_now_in_one_line_and_a_pipe_does_not(
    screen: io.StringIO, is_shown: bool
) -> None:
    progress = Progress(screen)
    progress.left = progress.total = Counter({5: 3})
    progress.pytest_runtest_logstart(CLAIMS[1])
    said = "   5 loss           1 of 3: test_the_loss_equals_the_reference"
    assert screen.getvalue().startswith(f"\r\x1b[K{said}") == is_shown and "\n" not in screen.getvalue()
    assert is_shown or not screen.getvalue()


def test_a_capability_that_is_offered_and_not_judged_is_named_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = climbed(WithoutNorms, tmp_path, NORM)[1]
    reason = "the trainer raised NotImplementedError: no clipping here"
    assert record["offered_not_judged"] == {"gradient_norms": reason}
    assert f"offered but not judged: gradient_norms ({reason})" in capsys.readouterr().out


def ladder_of(*claims: Claim) -> Ladder:
    ladder = Ladder("my_adapter:MyTrainer", ReferenceTrainer, claims=list(claims))
    for claim in claims:
        ladder.outcomes[claim.rung][claim.outcome] += 1
    return ladder


def not_claimed(reason: str, *needs: str) -> Claim:
    return Claim(4, "test", "not claimed", f"not claimed: {reason}", 0.0, needs)


def test_what_was_judged_is_counted_by_claims_and_rungs() -> None:
    passed = [Claim(rung, "test", "passed", "", 0.0) for rung in (14, 2, 3, 4, 4)]
    assert what_was_judged(ladder_of(passed[0], not_claimed("x"))) == "1 claim of rung 14"
    assert what_was_judged(ladder_of(*passed)) == "5 claims of rungs 2-4, 14"
    assert spans([]) == []


def test_a_capability_of_which_one_claim_was_judged_is_judged() -> None:
    passed = Claim(5, "test", "passed", "", 0.0, ("evaluate",))
    assert offered_but_not_judged(ladder_of(not_claimed("x", "evaluate"), passed)) == {}
    other = offered_but_not_judged(ladder_of(not_claimed("merge", "evaluate")))
    assert other == {"evaluate": "its claims ask for merge too"}


def test_reasons_for_what_is_not_claimed_are_counted_and_the_rarest_counted_together() -> None:
    """Nothing is said where only capabilities are lacking, since these are listed."""
    assert list(reason_lines(ladder_of(not_claimed("merge")))) == []
    often = [not_claimed("adapter option")] * 3 + [not_claimed(f"switch {n}") for n in range(9)]
    (line,) = reason_lines(ladder_of(*often, not_claimed("merge"), not_claimed("the dialect says a")))
    assert line.startswith("14 not claimed: 3 'adapter option', 1 'switch 0', ")
    assert re.search(r", 2 for 2 other reasons, 1 by the dialect, 1 for lack of a capability$", line)
