"""The judge of a test: runs the same act on the candidate and on the reference, and compares the results.

The tolerances are those derived in tests/derived.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from tests.derived import (
    NUM_DRAWS,
    Divergence,
    Verdict,
    noise_of,
    require,
    require_same_bits,
    require_same_names,
    within,
    within_exact,
)
from tests.lora_ladder.cases import Case, Draw
from tests.lora_ladder.plugin import Ladder
from tests.lora_ladder.protocol import Arrays
from tests.trainers.reference import oracle

T = TypeVar("T")
Act = Callable[[Any], Mapping[str, Any]]  # does something with a trainer and returns the results by name

Expected = tuple[Arrays, dict[str, float]]  # the reference's results in float64, and their noise in float32

# Keyed by test, call, dialect and draw, since these results are the same for every candidate.
REFERENCE: dict[tuple[object, ...], Expected] = {}


@dataclass
class Judge:
    """The judge of one test. It records the largest share of a tolerance that was used."""

    ladder: Ladder
    nodeid: str
    calls: int = 0
    subject: str = ""  # what a test with many subjects judges now

    def __call__(self, case: Case, act: Act, longest_sum: int = 0, num_draws: int = NUM_DRAWS) -> Arrays:
        """The act's results on the candidate, if they equal the reference's within rounding."""
        __tracebackhide__ = True
        return self.given(self.run(case, act), case, act, longest_sum, num_draws)

    def given(
        self, ours: Arrays, case: Case, act: Act, longest_sum: int = 0, num_draws: int = NUM_DRAWS
    ) -> Arrays:
        """Results that the candidate came to in another way than the reference, which acts."""
        __tracebackhide__ = True
        ref64, noise = self.reference(case, act, num_draws)
        self.require_names(ours, ref64)
        k = longest_sum or case.longest_sum
        self.hold([within(n, ours[n], ref64[n], noise[n], k) for n in ref64])
        return ours

    def alike(self, one: tuple[Case, Act], other: tuple[Case, Act], longest_sum: int = 0) -> None:
        """Two acts give the same results on the candidate, within the rounding noise of both together."""
        __tracebackhide__ = True
        ours, theirs = self.run(*one), self.run(*other)
        (_, noise), (_, other_noise) = self.reference(*one), self.reference(*other)
        self.require_names(ours, theirs)
        k = longest_sum or one[0].longest_sum
        both = {n: float(np.hypot(noise[n], other_noise[n])) for n in theirs}
        self.hold([within(n, ours[n], theirs[n], both[n], k, "the noise of both") for n in theirs])

    def same_bits(self, ours: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        __tracebackhide__ = True
        self.report(lambda: require_same_bits(self.title, arrays(ours), arrays(expected)))

    def same_computation(
        self, ours: Mapping[str, Any], expected: Mapping[str, Any], longest_sum: int
    ) -> None:
        """Two ways to compute the same: to the bit, or within one rounding if the dialect says so."""
        __tracebackhide__ = True
        if self.candidate.dialect.equal == "to the bit":
            return self.same_bits(ours, expected)
        one, other = arrays(ours), arrays(expected)
        self.require_names(one, other)
        return self.hold([self.rounded(n, one[n], other[n], longest_sum) for n in other])

    def exactly(self, case: Case, act: Act) -> None:
        """In float64 throughout, every tensor is within 1e-12 of the reference."""
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

    def reference(self, case: Case, act: Act, num_draws: int = NUM_DRAWS) -> Expected:
        """The act's results on the float64 reference, and the noise of float32; computed once per process."""
        self.calls += 1
        key = (self.nodeid, self.subject, self.calls, self.candidate.dialect, Draw.number)
        if key not in REFERENCE:
            oracle64 = self.oracle(torch.float64)
            exact = arrays(act(case.build(oracle64)))
            drawn = (arrays(act(case.moved(seed).build(oracle64))) for seed in range(num_draws))
            REFERENCE[key] = exact, noise_of(drawn, exact)
        return REFERENCE[key]

    def rounded(self, name: str, ours: np.ndarray, expected: np.ndarray, longest_sum: int) -> Verdict:
        """A formula of exact inputs: the roundings of its longest sum are all that it may cost."""
        return within(name, ours, expected, 0.0, longest_sum)

    def hold(self, verdicts: list[Verdict]) -> None:
        __tracebackhide__ = True
        worst = self.report(lambda: require(self.title, verdicts))
        self.ladder.record_share(self.nodeid, worst.used, worst.name)

    def require_names(self, ours: Arrays, expected: Arrays) -> None:
        __tracebackhide__ = True
        self.report(lambda: require_same_names(self.title, ours, expected))

    def report(self, judgement: Callable[[], T]) -> T:
        """Adds the command that replays the test to the report of a divergence."""
        __tracebackhide__ = True
        try:
            return judgement()
        except Divergence as divergence:
            replay = f"{divergence}\n  replay: {self.ladder.replay(self.nodeid)}"
            raise Divergence(replay, divergence.times_tolerance) from None

    def claim(self, holds: bool, message: str) -> None:
        __tracebackhide__ = True

        def judgement() -> None:
            if not holds:
                raise Divergence(message)

        self.report(judgement)

    @property
    def title(self) -> str:
        return self.nodeid.rpartition("::")[2] + f" ({self.subject})" * bool(self.subject)


def arrays(results: Mapping[str, Any]) -> Arrays:
    return {name: np.asarray(value) for name, value in results.items()}
