"""Derived tolerances: how far a float32 result may lie from the float64 reference, and why.

    |ours - ref64| <= 8 * max(|ref32 - ref64|, sqrt(k) * u * |ref64|)      (Frobenius norms)

`ref32` is the same reference run in float32: its error is what the precision costs here, measured. Where
that happens to be tiny, the second term stands in: u = 2**-24 is float32's unit roundoff, k the length of
the longest sum, sqrt(k) * u what independent rounding errors add up to. The factor 8 is the only choice.
In bfloat16 u is 2**-8, and nothing is measured: the second term alone is what a result is held to.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

FACTOR = 8.0
UNIT_ROUNDOFF = 2.0**-24
BFLOAT16_ROUNDOFF = 2.0**-8
EXACT = 1e-12  # the project's promise for float64: relative, in the Frobenius norm


@dataclass(frozen=True)
class Verdict:
    """The comparison of one tensor, in words and figures."""

    name: str
    error: float
    tolerance: float
    report: str

    @property
    def used(self) -> float:
        """The share of the tolerance; infinite where it is none, or where the error is not a number."""
        if np.isnan(self.error):
            return np.inf
        return self.error / self.tolerance if self.tolerance else np.inf if self.error else 0.0


class Divergence(AssertionError):
    """A tensor that is out of its tolerance; the text is the whole report."""


def compare(name: str, ours: np.ndarray, ref32: np.ndarray, ref64: np.ndarray, longest_sum: int) -> Verdict:
    noise = float(np.linalg.norm(ref32 - ref64))
    return within(name, ours, ref64, noise, longest_sum)


def within(name: str, ours: np.ndarray, expected: np.ndarray, noise: float, longest_sum: int) -> Verdict:
    """`ours` held to `expected`, where float32 is measured to cost `noise`."""
    floor = float(np.sqrt(longest_sum) * UNIT_ROUNDOFF * np.linalg.norm(expected))
    source = "the reference's float32 noise" if noise >= floor else "sqrt(k) u |expected|"
    derivation = f"{FACTOR:g} x {source} (noise {noise:.3g}, floor {floor:.3g}, k {longest_sum})"
    return judged(name, ours, expected, FACTOR * max(noise, floor), derivation)


def within_exact(name: str, ours: np.ndarray, ref64: np.ndarray) -> Verdict:
    """float64 held to float64."""
    tolerance = EXACT * float(np.linalg.norm(ref64))
    return judged(name, ours, ref64, tolerance, f"{EXACT:g} x |expected|, the promise for float64")


def within_bfloat16(name: str, ours: np.ndarray, ref64: np.ndarray, longest_sum: int) -> Verdict:
    """What was computed in bfloat16, from numbers that bfloat16 holds, held to float64."""
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


def require(what: str, verdicts: list[Verdict], allowed: float = 1.0) -> Verdict:
    """The verdict that used most of its tolerance; raises Divergence with the first that used too much."""
    __tracebackhide__ = True
    failed = [verdict for verdict in verdicts if not verdict.used <= allowed]
    if failed:
        most = "" if allowed == 1 else f" (of which this trainer allows itself {allowed:.0%})"
        raise Divergence(
            f"{what}: {len(failed)} of {len(verdicts)} tensors out of tolerance{most}; the first is\n"
            + failed[0].report
        )
    return max(verdicts, key=lambda verdict: verdict.used)


def require_same_names(what: str, ours: Mapping[str, object], expected: Mapping[str, object]) -> None:
    __tracebackhide__ = True
    if ours.keys() != expected.keys():
        missing, unknown = some_of(expected.keys() - ours.keys()), some_of(ours.keys() - expected.keys())
        raise Divergence(f"{what}: names differ: missing {missing}; unknown {unknown}")


def some_of(names: Collection[str]) -> str:
    """The first three, and how many more."""
    first = ", ".join(sorted(names)[:3]) or "none"
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first


def require_same_bits(what: str, ours: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Tolerance 0, because the order of operations is the same; the first that differs is the report."""
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
    """Every named tensor within its derived tolerance; the message names the first that is not."""
    __tracebackhide__ = True
    replay = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
    what = f"{what} (replay: pytest {replay!r})"
    require_same_names(what, ours, ref64)
    worst = require(what, [compare(n, ours[n], ref32[n], ref64[n], longest_sum) for n in ref64])
    print(f"{what}: worst of {len(ref64)}: {worst.name} used {worst.used:.0%} of its tolerance")
