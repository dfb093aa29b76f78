"""What was judged and what was not, in words: for the end of the report."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

from tests.lora_ladder.capabilities import OPTIONAL
from tests.lora_ladder.outcome import Claim
from tests.lora_ladder.plugin import NOT_CLAIMED, OF_DIALECT, Ladder

MOST_REASONS = 8  # the others are counted together
LONGEST_REASON = 60  # characters


def what_was_judged(ladder: Ladder) -> str:
    """ "1 claim of rung 14", "530 claims of rungs 1, 4-9"; those that passed or failed."""
    judged = {rung: n["passed"] + n["failed"] for rung, n in ladder.outcomes.items()}
    number, rungs = sum(judged.values()), sorted(rung for rung, n in judged.items() if n)
    return f"{number} claim{'s' * (number != 1)} of rung{'s' * (len(rungs) != 1)} {', '.join(spans(rungs))}"


def spans(numbers: list[int]) -> list[str]:
    """[1, 2, 3, 7] -> ["1-3", "7"]"""
    groups = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


def offered_but_not_judged(ladder: Ladder) -> dict[str, str]:
    """Capability -> why none of the claims that ask for it was judged, though the class has it."""
    found: dict[str, str] = {}
    for name in OPTIONAL:
        claims = [c for c in ladder.claims if name in c.needs and name not in ladder.not_claimed]
        if claims and all(claim.outcome == "not claimed" for claim in claims):
            raised = [claim for claim in claims if kind_of(claim) == "raised"]
            found[name] = because((raised or claims)[0])
    return found


def kind_of(claim: Claim) -> str:
    """What a claim was not judged for: a capability that is lacking, the dialect, or what a call raised."""
    reason = claim.reason.removeprefix(NOT_CLAIMED)
    if reason in OPTIONAL:
        return "capability"
    return "dialect" if reason.startswith(OF_DIALECT) else "raised"


def because(claim: Claim) -> str:
    reason = short(claim.reason.removeprefix(NOT_CLAIMED))
    kind = kind_of(claim)
    if kind == "capability":
        return f"its claims ask for {reason} too"
    if kind == "dialect":
        return reason
    return "the trainer raised NotImplementedError" + f": {reason}" * (reason != "NotImplementedError")


def short(reason: str) -> str:
    line = next(iter(reason.splitlines()), "")
    return line if len(line) <= LONGEST_REASON else line[: LONGEST_REASON - 3] + "..."


def offered_lines(ladder: Ladder) -> Iterator[str]:
    """A line for each reason, with the capabilities that it keeps from being judged."""
    offered = offered_but_not_judged(ladder)
    for reason in dict.fromkeys(offered.values()):
        names = [name for name, its_reason in offered.items() if its_reason == reason]
        yield f"offered but not judged: {', '.join(names)} ({reason})"


def reason_lines(ladder: Ladder) -> Iterator[str]:
    """One line that counts why claims were not judged; nothing where only capabilities are lacking."""
    claims = [claim for claim in ladder.claims if claim.outcome == "not claimed"]
    kinds = Counter(map(kind_of, claims))
    reasons = Counter(short(c.reason.removeprefix(NOT_CLAIMED)) for c in claims if kind_of(c) == "raised")
    if not reasons:
        return
    most = reasons.most_common(MOST_REASONS)
    words = [f"{number} {reason!r}" for reason, number in most]
    others = len(reasons) - len(most)
    if others:
        number = reasons.total() - sum(number for _, number in most)
        words.append(f"{number} for {others} other reason{'s' * (others > 1)}")
    words += [f"{kinds['dialect']} by the dialect"] * bool(kinds["dialect"])
    words += [f"{kinds['capability']} for lack of a capability"] * bool(kinds["capability"])
    yield f"{len(claims)} not claimed: {', '.join(words)}"
