"""Derived tolerances: how far a float32 result may lie from the float64 reference, and why.

    |ours - ref64| <= 8 * max(|ref32 - ref64|, sqrt(k) * u * |ref64|)      (Frobenius norms)

`ref32` is the same reference run in float32: its error is what the precision costs here, measured. Where
that happens to be tiny, the second term stands in: u = 2**-24 is float32's unit roundoff, k the length of
the longest sum, sqrt(k) * u what independent rounding errors add up to. The factor 8 is the only choice.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

FACTOR = 8.0
UNIT_ROUNDOFF = 2.0**-24


@dataclass(frozen=True)
class Verdict:
    """The comparison of one tensor, in words and figures."""

    name: str
    error: float
    tolerance: float
    report: str

    @property
    def used(self) -> float:
        return self.error / self.tolerance if self.tolerance else float(self.error > 0)


def compare(name: str, ours: np.ndarray, ref32: np.ndarray, ref64: np.ndarray, longest_sum: int) -> Verdict:
    if ours.shape != ref64.shape:
        return Verdict(name, np.inf, 0.0, f"{name}: shape {ours.shape}, expected {ref64.shape}")
    noise = float(np.linalg.norm(ref32 - ref64))
    floor = float(np.sqrt(longest_sum) * UNIT_ROUNDOFF * np.linalg.norm(ref64))
    tolerance = FACTOR * max(noise, floor)
    difference = np.abs(ours - ref64)
    error = float(np.linalg.norm(difference))
    worst = np.unravel_index(int(np.argmax(difference)), difference.shape)
    source = "float32 noise of the reference" if noise >= floor else "sqrt(k) u |ref64|"
    report = (
        f"{name}: worst element {tuple(map(int, worst))}: expected {ref64[worst]:.9g}, "
        f"got {ours[worst]:.9g}; |error| {error:.3g}, tolerance {tolerance:.3g} "
        f"= 8 x {source} (noise {noise:.3g}, floor {floor:.3g}, k {longest_sum})"
    )
    return Verdict(name, error, tolerance, report)


def assert_within_rounding(
    rung: str,
    ours: dict[str, np.ndarray],
    ref32: dict[str, np.ndarray],
    ref64: dict[str, np.ndarray],
    longest_sum: int,
) -> None:
    """Every named tensor within its derived tolerance; the message names the first that is not."""
    assert ours.keys() == ref64.keys(), (
        f"{rung}: names differ: only ours {sorted(ours.keys() - ref64.keys())}, "
        f"only the reference's {sorted(ref64.keys() - ours.keys())}"
    )
    verdicts = [compare(n, ours[n], ref32[n], ref64[n], longest_sum) for n in ref64]
    worst = max(verdicts, key=lambda verdict: verdict.used)
    print(f"{rung}: worst of {len(verdicts)}: {worst.name} used {worst.used:.0%} of its tolerance")
    failed = [verdict for verdict in verdicts if not verdict.used <= 1]
    replay = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
    assert not failed, (
        f"{rung}: {len(failed)} of {len(verdicts)} tensors are out; the first is\n{failed[0].report}\n"
        f"replay: pytest {replay!r}"
    )
