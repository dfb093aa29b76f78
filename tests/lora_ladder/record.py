"""A climb as a record for other programs: `lora-ladder my_adapter:MyTrainer --json FILE`.

`schema` is the version of this form; it grows by one when a field changes its meaning or is taken away.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

from tests.lora_ladder.outcome import Claim, Failure
from tests.lora_ladder.plugin import Ladder
from tests.lora_ladder.summary import HEADLINE, closing_lines
from tests.lora_ladder.tally import offered_but_not_judged
from tests.lora_ladder.versions import PACKAGES, version_of

SCHEMA = 1
NOT_SAID = "not said"


def record_of(ladder: Ladder) -> dict[str, Any]:
    """Plain dicts, lists, texts and finite numbers."""
    candidate, summary = ladder.candidate, list(closing_lines(ladder))
    return {
        "schema": SCHEMA,
        "trainer": ladder.trainer,
        "verdict": verdict_of(ladder),
        "dialect": dataclasses.asdict(candidate.dialect),
        "departures": candidate.dialect.departures(),
        "optimizer_from": str(getattr(candidate, "optimizer_from", NOT_SAID)),
        "schedule_from": str(getattr(candidate, "schedule_from", NOT_SAID)),
        "draw": ladder.draw,
        "versions": {name: version_of(name) for name in ("lora-ladder", *PACKAGES)},
        "seconds": round(sum(claim.seconds for claim in ladder.claims), 1),
        "counts": dict(Counter(claim.outcome for claim in ladder.claims)),
        "rungs": [of_rung(ladder, rung) for rung in sorted(ladder.outcomes)],
        "first_divergence": of_failure(ladder, ladder.first_divergence, summary),
        "not_claimed": ladder.not_claimed,
        "offered_not_judged": offered_but_not_judged(ladder),
        "interrupted": interruption_of(ladder),
        "summary": summary,
        "claims": [of_claim(claim) for claim in ladder.claims],
    }


def verdict_of(ladder: Ladder) -> str:
    if ladder.first_divergence:
        return "first divergence"
    if ladder.is_interrupted:
        return "interrupted"
    return "nothing was judged" if ladder.nothing_was_judged else "no divergence"


def interruption_of(ladder: Ladder) -> str | None:
    """The claim that was being judged, "between two claims", or None."""
    if not ladder.is_interrupted:
        return None
    return name_of(ladder.running) if ladder.running else "between two claims"


def of_rung(ladder: Ladder, rung: int) -> dict[str, Any]:
    """`share` is the largest share of a tolerance that was used, and `tensor` used it; both may be null."""
    share, tensor = ladder.shares.get(rung, (math.nan, None))
    counts = Counter(claim.outcome for claim in ladder.claims if claim.rung == rung)
    is_known = math.isfinite(share)
    return {
        "rung": rung,
        "title": ladder.titles[rung],
        "counts": dict(counts),
        "share": share if is_known else None,
        "tensor": tensor,
    }


def of_failure(ladder: Ladder, first: Failure | None, summary: list[str]) -> dict[str, Any] | None:
    """`report` is the end of the summary, which is made once, because that may take seconds."""
    if first is None:
        return None
    start = next(n for n, line in enumerate(summary) if line.startswith(HEADLINE))
    return {
        "rung": first.rung,
        "title": ladder.titles[first.rung],
        "claim": name_of(first.test),
        "outcome": next(c.outcome for c in ladder.claims if c.test == first.test),
        "report": summary[start:],
        "raised_at": first.place,
        "replay": ladder.replay(first.test),
    }


def of_claim(claim: Claim) -> dict[str, Any]:
    return {
        "rung": claim.rung,
        "claim": name_of(claim.test),
        "test": claim.test,
        "outcome": claim.outcome,
        "reason": claim.reason,
        "seconds": round(claim.seconds, 3),
    }


def name_of(test: str) -> str:
    """test_05_loss.py::test_a_hand_worked_example[untied] -> a hand worked example [untied]"""
    name, bracket, case = test.partition("::")[2].removeprefix("test_").partition("[")
    return name.replace("_", " ") + f" {bracket}{case}" * bool(bracket)
