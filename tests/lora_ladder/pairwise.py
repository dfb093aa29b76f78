"""Pairwise cover: few combinations in which every two levels of any two factors meet.

Most bugs of combinations need two settings and no third (Kuhn, Wallace and Gallo 2004, "Software Fault
Interactions and Implications for Software Testing"), and a pairwise cover of twenty settings has some twenty
rows where all combinations would be millions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

Row = dict[str, str]  # factor -> level
Pair = frozenset[tuple[str, str]]  # two levels, each with its factor


def all_pairs(factors: Mapping[str, Sequence[str]]) -> set[Pair]:
    """Every two levels of different factors."""
    return {
        frozenset({(one, level), (other, other_level)})
        for one, other in combinations(factors, 2)
        for level in factors[one]
        for other_level in factors[other]
    }


def pairs_of(row: Row) -> set[Pair]:
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def pairwise_cover(factors: Mapping[str, Sequence[str]]) -> list[Row]:
    """A greedy cover, the same each time: a row starts from a pair that is still missing.

    Its other factors, one after the other, take the level that adds most missing pairs.
    """
    missing, rows = all_pairs(factors), []
    while missing:
        row = dict(min(missing, key=lambda pair: sorted(pair)))
        for factor in sorted(factors, key=lambda factor: -len(factors[factor])):
            if factor not in row:
                row[factor] = max(factors[factor], key=lambda level: num_new(row, factor, level, missing))
        missing -= pairs_of(row)
        rows.append({factor: row[factor] for factor in factors})
    return rows


def num_new(row: Row, factor: str, level: str, missing: set[Pair]) -> int:
    return sum(frozenset({(factor, level), other}) in missing for other in row.items())
