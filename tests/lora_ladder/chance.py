"""Statistical claims with a bound on their false alarms that holds for every sample size.

A claim calls a right trainer wrong with probability at most FALSE_ALARM. Where it makes many comparisons at
once, each gets its share of that (the union bound).

Sources: Hoeffding 1963, "Probability inequalities for sums of bounded random variables", theorem 2; Massart
1990, "The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from tests.derived import Divergence

FALSE_ALARM = 1e-10  # of one claim: ten of them together 1e-9


def sum_bound(num_signs: np.ndarray | float, num_comparisons: int) -> np.ndarray:
    """What the sum of so many independent signs does not exceed: sqrt(2 n ln(2 m / FALSE_ALARM)).

    By Hoeffding's inequality; m is the number of comparisons. Values in [-1, 1] of mean 0 will do for signs.
    """
    return np.sqrt(2 * np.asarray(num_signs, dtype=float) * np.log(2 * num_comparisons / FALSE_ALARM))


def distribution_bound(num_values: int) -> float:
    """What the distance of an empirical from the true distribution function does not exceed."""
    return float(np.sqrt(np.log(2 / FALSE_ALARM) / (2 * num_values)))


def correlations(ours: np.ndarray, others: np.ndarray) -> np.ndarray:
    """sum_i ours[i] others[i + d] for every displacement d, by FFT; d = 0 is the element [0, ..., 0].

    Signs of +1 and -1; 0 stands for a value that is not known. Under independence the products of one
    displacement d != 0 are independent signs: the pairs (i, i + d) form chains, never a circle.
    """
    shape = [2 * n for n in ours.shape]  # so that no displacement wraps around
    axes = tuple(range(ours.ndim))
    product = np.conj(np.fft.rfftn(ours, shape, axes)) * np.fft.rfftn(others, shape, axes)
    return np.rint(np.fft.irfftn(product, shape, axes))


def require_independent(what: str, signs: np.ndarray, axes: Sequence[str]) -> None:
    """No value says anything about another one: the autocorrelation is 0 within chance."""
    sums = correlations(signs, signs)
    sums.flat[0] = 0  # of every value with itself
    require_uncorrelated(what, sums, correlations(np.abs(signs), np.abs(signs)), signs.shape, axes)


def require_unrelated(what: str, ours: np.ndarray, others: np.ndarray, axes: Sequence[str]) -> None:
    """No value of one array says anything about one of the other, wherever it stands."""
    sums, counts = correlations(ours, others), correlations(np.abs(ours), np.abs(others))
    require_uncorrelated(what, sums, counts, ours.shape, axes)


def require_uncorrelated(
    what: str, sums: np.ndarray, counts: np.ndarray, shape: tuple[int, ...], axes: Sequence[str]
) -> None:
    __tracebackhide__ = True
    excess = np.abs(sums) - sum_bound(counts, sums.size)
    worst = np.unravel_index(int(np.argmax(excess)), excess.shape)
    if excess[worst] <= 0:
        return
    moved = [
        f"{(d if d < n else d - 2 * n):+d} {axis}" for d, n, axis in zip(worst, shape, axes, strict=True) if d
    ]
    raise Divergence(
        f"{what}: values {' and '.join(moved) or 'at the same place'} apart are related: "
        f"correlation {sums[worst] / counts[worst]:.3f} over {counts[worst]:.0f} pairs, "
        f"independent ones stay within {sum_bound(counts[worst], sums.size) / counts[worst]:.3f} "
        f"(Hoeffding's bound, false alarm {FALSE_ALARM:g})"
    )


def require_means(
    what: str, values: np.ndarray, is_known: np.ndarray, mean: float, axes: Sequence[str]
) -> None:
    """Of independent values in [0, 1]: over all, over each index of an axis, and over each of two axes."""
    __tracebackhide__ = True
    kept = [axis for size in range(3) for axis in combinations(range(values.ndim), size)]
    num_comparisons = sum(math.prod(values.shape[axis] for axis in of) for of in kept)
    for of in kept:
        others = tuple(axis for axis in range(values.ndim) if axis not in of)
        sums, counts = (values * is_known).sum(others), is_known.sum(others)
        bounds = np.sqrt(counts * np.log(2 * num_comparisons / FALSE_ALARM) / 2)
        excess = np.atleast_1d(np.abs(sums - mean * counts) - bounds)
        worst = np.unravel_index(int(np.argmax(excess)), np.shape(sums))
        if excess.max() > 0:
            where = " and ".join(f"{axes[axis]} {index}" for axis, index in zip(of, worst, strict=True))
            found, count, bound = np.asarray(sums)[worst], np.asarray(counts)[worst], bounds[worst]
            raise Divergence(
                f"{what}{f' of {where}' if where else ''}: {found / count:.4f} of {count}, expected {mean:g} "
                f"within {bound / count:.4f} (Hoeffding's bound, false alarm {FALSE_ALARM:g})"
            )


def require_uniform(what: str, values: np.ndarray) -> None:
    """Independent values with the law U(-1, 1): none is outside, and their distribution function is it."""
    __tracebackhide__ = True
    ordered = np.sort(values.ravel())
    if not np.abs(ordered).max() <= 1:
        raise Divergence(f"{what}: must be within 1, got {ordered[np.argmax(np.abs(ordered))]:.6g}")
    ranks, exact = np.arange(ordered.size + 1) / ordered.size, (ordered + 1) / 2
    distance = max(np.abs(exact - ranks[1:]).max(), np.abs(exact - ranks[:-1]).max())
    bound = distribution_bound(ordered.size)
    if not distance <= bound:
        raise Divergence(
            f"{what}: the distribution of {ordered.size} values is {distance:.4f} from uniform, at most "
            f"{bound:.4f} (Dvoretzky, Kiefer, Wolfowitz; false alarm {FALSE_ALARM:g})"
        )
