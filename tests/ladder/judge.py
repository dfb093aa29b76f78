"""The judge of a test: the same act on the candidate and on the reference, compared by derivation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from tests.derived import (
    Divergence,
    Verdict,
    require,
    require_same_bits,
    require_same_names,
    within,
    within_exact,
)
from tests.ladder.cases import Case
from tests.ladder.plugin import Ladder
from tests.ladder.protocol import Arrays
from tests.trainers.reference import oracle

T = TypeVar("T")
Act = Callable[[Any], Mapping[str, Any]]  # what is done with a trainer, and what comes of it by name

# What float32 costs is a matter of luck, so it is measured in several runs of the reference: as it is, and
# with every weight and factor moved to one of its two neighbours, as another rounding might have left it.
NUM_ROUNDINGS = 4

# The reference's results, by test and dialect: they are the same for every candidate.
REFERENCE: dict[tuple[object, ...], list[Arrays]] = {}


@dataclass
class Judge:
    """For one test. Names the candidate, remembers the largest share of tolerance used."""

    ladder: Ladder
    nodeid: str
    calls: int = 0

    def __call__(
        self, case: Case, act: Act, longest_sum: int = 0, num_roundings: int = NUM_ROUNDINGS
    ) -> Arrays:
        """The act's results on the candidate, if they are within rounding of those on the reference."""
        __tracebackhide__ = True
        ours = self.run(case, act)
        ref64, *roundings = self.reference(case, act, num_roundings)
        self.require_names(ours, ref64)
        k = longest_sum or case.longest_sum
        noise = {n: most_apart(n, ref64, roundings) for n in ref64}
        self.hold([within(n, ours[n], ref64[n], noise[n], k) for n in ref64])
        return ours

    def alike(self, one: tuple[Case, Act], other: tuple[Case, Act], longest_sum: int = 0) -> None:
        """Two acts give the candidate the same, within what float32 costs the reference in either."""
        __tracebackhide__ = True
        ours, theirs = self.run(*one), self.run(*other)
        one64, *roundings = self.reference(*one)
        _, other32, *_ = self.reference(*other)
        self.require_names(ours, theirs)
        k = longest_sum or one[0].longest_sum
        noise = {n: most_apart(n, one64, [*roundings, other32]) for n in theirs}
        self.hold([within(n, ours[n], theirs[n], noise[n], k) for n in theirs])

    def same_bits(self, ours: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        __tracebackhide__ = True
        self.report(lambda: require_same_bits(self.title, arrays(ours), arrays(expected)))

    def exactly(self, case: Case, act: Act) -> None:
        """In float64 throughout: within 1e-12 of the reference, tensor by tensor."""
        __tracebackhide__ = True
        double = case.in_double()
        with self.candidate.exact():
            ours = arrays(act(double.build(self.candidate)))
        ref64 = arrays(act(double.build(self.oracle(torch.float64))))
        self.require_names(ours, ref64)
        self.hold([within_exact(name, ours[name], ref64[name]) for name in ref64])

    @property
    def candidate(self) -> Any:
        return self.ladder.candidate

    def oracle(self, dtype: torch.dtype) -> Any:
        return oracle(self.candidate.dialect, dtype)

    def run(self, case: Case, act: Act) -> Arrays:
        return arrays(act(case.build(self.candidate)))

    def reference(self, case: Case, act: Act, num_roundings: int = NUM_ROUNDINGS) -> list[Arrays]:
        """The act on the reference in float64, then in float32 in several roundings; once in a process."""
        self.calls += 1
        key = (self.nodeid, self.calls, self.candidate.dialect)
        if key not in REFERENCE:
            oracle32, oracle64 = self.oracle(torch.float32), self.oracle(torch.float64)
            cases = [case, *(case.rounded_anew(seed) for seed in range(num_roundings - 1))]
            results = [act(case.build(oracle64)), *(act(rounded.build(oracle32)) for rounded in cases)]
            REFERENCE[key] = [arrays(result) for result in results]
        return REFERENCE[key]

    def hold(self, verdicts: list[Verdict]) -> None:
        __tracebackhide__ = True
        allowed = getattr(self.candidate, "share_allowed", 1.0)
        worst = self.report(lambda: require(self.title, verdicts, allowed))
        self.ladder.record_share(self.nodeid, worst.used, worst.name)

    def require_names(self, ours: Arrays, expected: Arrays) -> None:
        __tracebackhide__ = True
        self.report(lambda: require_same_names(self.title, ours, expected))

    def report(self, judgement: Callable[[], T]) -> T:
        """Whatever diverges is reported with the command that replays it."""
        __tracebackhide__ = True
        try:
            return judgement()
        except Divergence as divergence:
            raise Divergence(f"{divergence}\n  replay: {self.ladder.replay(self.nodeid)}") from None

    @property
    def title(self) -> str:
        return self.nodeid.rpartition("::")[2]


def most_apart(name: str, ref64: Arrays, others: list[Arrays]) -> float:
    return max(float(np.linalg.norm(other[name] - ref64[name])) for other in others)


def arrays(results: Mapping[str, Any]) -> Arrays:
    return {name: np.asarray(value) for name, value in results.items()}
