"""The summary at the end of a run: one line per rung, and the first divergence."""

from __future__ import annotations

import platform
from collections.abc import Iterator

from tests.lora_ladder.culprit import culprit_lines
from tests.lora_ladder.plugin import Ladder
from tests.lora_ladder.tally import offered_lines, reason_lines, what_was_judged
from tests.lora_ladder.versions import PACKAGES, version_of

HEADLINE = "first divergence: "  # begins the report of a failure
KINDS = ("passed", "failed", "error", "errors", "known failures", "not claimed", "skipped")


def header_lines(ladder: Ladder) -> list[str]:
    """The trainer under test, what it does not claim, and the platform."""
    versions = [f"{name} {version_of(name)}" for name in PACKAGES]
    draw = f", draw {ladder.draw}" * bool(ladder.draw)
    return [
        f"ladder: {ladder.trainer}, dialect: {departures(ladder)}{draw}",
        f"ladder: not claimed: {', '.join(ladder.not_claimed) or 'nothing'}",
        f"ladder: {', '.join(versions)}, {platform.platform()}",
    ]


def departures(ladder: Ladder) -> str:
    return "; ".join(ladder.candidate.dialect.departures()) or "canonical"


def summary_lines(ladder: Ladder) -> Iterator[str]:
    for rung in sorted(ladder.outcomes):
        yield rung_line(ladder, rung)
    yield from closing_lines(ladder)


def closing_lines(ladder: Ladder) -> Iterator[str]:
    """What follows the rungs: how the trainer was judged, and the first divergence."""
    yield from larger_shares(ladder)
    yield from made_by(ladder)
    if ladder.candidate.dialect.departures():
        yield f"judged as declared: {departures(ladder)}"
    if ladder.not_claimed:
        yield f"not claimed: {', '.join(ladder.not_claimed)}"
    yield from reason_lines(ladder)
    yield from offered_lines(ladder)
    if ladder.is_interrupted:
        where = f"while {ladder.running} was judged" if ladder.running else "between two claims"
        yield f"interrupted {where}; what follows was not judged"
    yield from divergence_lines(ladder)


def rung_line(ladder: Ladder, rung: int) -> str:
    counts = ladder.outcomes[rung].copy()
    errors = sum(claim.outcome == "error" for claim in ladder.claims if claim.rung == rung)
    counts["failed"] -= errors
    counts["error" if errors == 1 else "errors"] = errors
    words = [f"{counts[kind]} {kind}" for kind in KINDS if counts[kind]]
    if counts["blocked"]:
        assert ladder.first_divergence is not None
        words.append(f"{counts['blocked']} blocked by rung {ladder.first_divergence.rung}")
    line = f"{rung:>4} {ladder.titles[rung]:<14} {', '.join(words)}"
    if rung not in ladder.shares:
        return line
    share, tensor = ladder.shares[rung]
    return f"{line:<72} at most {share:.0%} of tolerance ({tensor})"


def larger_shares(ladder: Ladder) -> Iterator[str]:
    """A warning for each rung that used a larger share of a tolerance than the trainer's `share_expected`."""
    expected = getattr(ladder.candidate, "share_expected", 1.0)
    for rung, (share, tensor) in sorted(ladder.shares.items()):
        if expected < share <= 1:
            yield f"warning: rung {rung} uses {share:.0%} of a tolerance ({tensor}), expected {expected:.0%}"


def made_by(ladder: Ladder) -> Iterator[str]:
    """By whom optimizer and schedule came, if the class says so: a fault there may not be the trainer's."""
    for part in ("optimizer", "schedule"):
        source = getattr(ladder.candidate, f"{part}_from", None)
        if source:
            yield f"{part} from: {source}"


def divergence_lines(ladder: Ladder) -> Iterator[str]:
    first = ladder.first_divergence
    if first is None:
        is_empty = ladder.nothing_was_judged or not ladder.outcomes
        judged = f"no divergence in what was judged: {what_was_judged(ladder)}"
        yield "nothing was judged" if is_empty else judged
        return
    yield f"{HEADLINE}rung {first.rung}, {ladder.titles[first.rung]}: {first.test.partition('::')[2]}"
    yield from (f"  {line}" for line in first.report.splitlines())
    if first.place:
        yield f"  raised at {first.place}"
    if "replay: " not in first.report:
        yield f"  replay: {ladder.replay(first.test)}"
    yield from culprit_lines(ladder)
    others = sorted({f.rung for f in ladder.failures if f.rung > first.rung})
    if others:
        yield f"  judged alone, also out: {', '.join(f'rung {n}, {ladder.titles[n]}' for n in others)}"
