"""Derived tolerances: how far a float32 result may be from the float64 reference, and why.

    |ours - ref64| <= 8 * max(noise, sqrt(k) * u * |ref64|)      (Frobenius norms)

u = 2**-24 is float32's unit roundoff and k the length of the longest sum. The second term, the floor, is what
the independent rounding errors of the last sum add up to. The first, the noise, is the effect of all earlier
roundings:

**noise** is the root mean square of |ref64(moved inputs) - ref64| over NUM_DRAWS draws, all in float64. In
each draw every weight and factor is moved at random, uniformly by up to sqrt(k / 2) u of itself
(`Case.moved`). This models the backward error of a float32 program, which computes the exact result for
slightly different inputs. If k products are added one after the other, the j-th goes through k - j + 1
roundings, k / 2 on average, each uniform within u. Together they have a standard deviation of sqrt(k / 2) u /
sqrt(3), and so has the move.

The noise is estimated without running a float32 program, so it does not depend on the CPU dispatch of PyTorch
or MKL, on a BLAS or on a GPU: float64 results of two machines agree to 1e-15, so their noise agrees to 1e-6.
It assumes the least accurate order of summation, and for every weight the longest sum; a BLAS that adds in
blocks is more accurate. Outside of the ladder and of `tests/properties`, where a result has thousands of
elements and no single direction dominates its error, the error of another float32 program is used as the
noise (`compare`).

Is FACTOR = 8 enough for any right trainer? Its error is one more draw from the same distribution. In the
worst case the whole error is along one direction (20 updates of Adam can make one element of one factor
dominate). Then error / noise has Student's t distribution with NUM_DRAWS degrees of freedom, and exceeds 8
with probability 4.4e-5. If the error spreads over two directions, the square is F distributed and the
probability is 2.3e-8; over more directions it is smaller still. A quarter of the tolerance is two standard
deviations, which an error in one direction exceeds in 8 of 100 claims. So a trainer that usually needs less
may say so (`share_expected`); using more is only a warning.

In bfloat16, u is 2**-8, and the tolerance has the second term only.

Sources: Higham 2002, "Accuracy and Stability of Numerical Algorithms", sections 1.5, 3.1 and 4.2; Higham and
Mary 2019, "A new approach to probabilistic rounding error analysis" (sqrt(k) for independent roundings).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

FACTOR = 8.0
UNIT_ROUNDOFF = 2.0**-24
BFLOAT16_ROUNDOFF = 2.0**-8
NUM_DRAWS = 8
EXACT = 1e-12  # the project's promise for float64: relative, in the Frobenius norm


@dataclass(frozen=True)
class Verdict:
    """The comparison of one tensor: the numbers, and a report in words."""

    name: str
    error: float
    tolerance: float
    report: str

    @property
    def used(self) -> float:
        """The share of the tolerance that the error uses; infinite for NaN, or an error at tolerance 0."""
        if np.isnan(self.error):
            return np.inf
        return self.error / self.tolerance if self.tolerance else np.inf if self.error else 0.0


class Divergence(AssertionError):
    """A tensor is out of tolerance, or names or bits differ; the message is the whole report.

    `times_tolerance` is the worst tensor's error as a multiple of its tolerance; infinite for bits and names.
    """

    def __init__(self, report: str, times_tolerance: float = np.inf) -> None:
        super().__init__(report)
        self.times_tolerance = times_tolerance


def noise_of(draws: Iterable[Mapping[str, np.ndarray]], exact: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The root mean square over the draws of |drawn - exact|, for each result."""
    squares = [{name: np.sum(np.square(drawn[name] - exact[name])) for name in exact} for drawn in draws]
    return {name: float(np.sqrt(sum(of[name] for of in squares) / max(1, len(squares)))) for name in exact}


def compare(name: str, ours: np.ndarray, ref32: np.ndarray, ref64: np.ndarray, longest_sum: int) -> Verdict:
    """Without a `Case` to move: the noise is the error of another float32 program, `ref32`."""
    noise = float(np.linalg.norm(ref32 - ref64))
    return within(name, ours, ref64, noise, longest_sum, "the error of another float32 program")


def within(
    name: str,
    ours: np.ndarray,
    expected: np.ndarray,
    noise: float,
    longest_sum: int,
    source_of_noise: str = "the noise of moved inputs",
) -> Verdict:
    """Compare `ours` with `expected`; `noise` is the float32 error from everything before the last sum."""
    floor = float(np.sqrt(longest_sum) * UNIT_ROUNDOFF * np.linalg.norm(expected))
    source = source_of_noise if noise >= floor else "sqrt(k) u |expected|"
    derivation = f"{FACTOR:g} x {source} (noise {noise:.3g}, floor {floor:.3g}, k {longest_sum})"
    return judged(name, ours, expected, FACTOR * max(noise, floor), derivation)


def within_exact(name: str, ours: np.ndarray, ref64: np.ndarray) -> Verdict:
    """Compare two float64 results."""
    tolerance = EXACT * float(np.linalg.norm(ref64))
    return judged(name, ours, ref64, tolerance, f"{EXACT:g} x |expected|, the promise for float64")


def within_bfloat16(name: str, ours: np.ndarray, ref64: np.ndarray, longest_sum: int) -> Verdict:
    """Compare a bfloat16 result with float64; the inputs must be exact in bfloat16."""
    tolerance = FACTOR * np.sqrt(longest_sum) * BFLOAT16_ROUNDOFF * float(np.linalg.norm(ref64))
    return judged(name, ours, ref64, tolerance, f"{FACTOR:g} x sqrt(k) 2**-8 |expected| (k {longest_sum})")


def judged(name: str, ours: np.ndarray, expected: np.ndarray, tolerance: float, derivation: str) -> Verdict:
    if ours.shape != expected.shape:
        return Verdict(name, np.inf, 0.0, f"{name}: shape {ours.shape}, expected {expected.shape}")
    difference = np.abs(ours - expected)
    error = float(np.linalg.norm(difference))
    if not np.isfinite(ours).all():
        return Verdict(name, np.inf, tolerance, f"{name}: {not_finite(ours, expected)}")
    worst = np.unravel_index(int(np.argmax(difference)), difference.shape)
    verdict = Verdict(name, error, tolerance, "")
    where = f"worst element {[int(i) for i in worst]}: " if worst else ""
    share = f"{verdict.used:.3g} of the " if tolerance else ""
    report = (
        f"{name}: {where}expected {expected[worst]:.9g}, "
        f"got {ours[worst]:.9g}\n"
        f"  |error| {error:.3g}, {share}tolerance {tolerance:.3g} = {derivation}"
    )
    return Verdict(name, error, tolerance, report)


def not_finite(ours: np.ndarray, expected: np.ndarray) -> str:
    first = tuple(int(i) for i in np.argwhere(~np.isfinite(ours))[0])
    where = f"; the first is {list(first)}" if first else ""
    return (
        f"not finite: {np.sum(~np.isfinite(ours))} of {ours.size} elements{where}: "
        f"expected {expected[first]:.9g}, got {ours[first]:.9g}"
    )


def require(what: str, verdicts: list[Verdict]) -> Verdict:
    """The verdict with the largest share of its tolerance. Raises Divergence if a tensor is out of it."""
    __tracebackhide__ = True
    failed = [verdict for verdict in verdicts if not verdict.used <= 1]
    if failed:
        raise Divergence(
            f"{what}: {len(failed)} of {len(verdicts)} tensors out of tolerance; the first is\n"
            + failed[0].report,
            max(verdict.used for verdict in failed),
        )
    return max(verdicts, key=lambda verdict: verdict.used)


def require_same_names(what: str, ours: Mapping[str, object], expected: Mapping[str, object]) -> None:
    __tracebackhide__ = True
    if ours.keys() != expected.keys():
        missing, unknown = some_of(expected.keys() - ours.keys()), some_of(ours.keys() - expected.keys())
        raise Divergence(f"{what}: names differ: missing {missing}; unknown {unknown}")


def some_of(names: Collection[str]) -> str:
    """The first three names, and the number of the others."""
    first = ", ".join(sorted(names)[:3]) or "none"
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first


def require_same_bits(what: str, ours: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Compare with tolerance 0, because the order of operations is the same."""
    __tracebackhide__ = True
    require_same_names(what, ours, expected)
    require(what, [judged(n, ours[n], expected[n], 0.0, "to the bit") for n in expected])


def assert_within_rounding(
    what: str,
    ours: dict[str, np.ndarray],
    ref32: dict[str, np.ndarray],
    ref64: dict[str, np.ndarray],
    longest_sum: int,
) -> None:
    """Every tensor is within its derived tolerance; the error names the first that is not."""
    __tracebackhide__ = True
    replay = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
    what = f"{what} (replay: pytest {replay!r})"
    require_same_names(what, ours, ref64)
    worst = require(what, [compare(n, ours[n], ref32[n], ref64[n], longest_sum) for n in ref64])
    print(f"{what}: worst of {len(ref64)}: {worst.name} used {worst.used:.0%} of its tolerance")
