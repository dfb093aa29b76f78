"""What is known of a peer: each way in which it departs from the reference, as a fact, with what shows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Departure:
    """A fact in one sentence, the claims of the ladder that fail by it, and a program that shows it alone.

    `declared` is the field of the dialect that declares it: the claims then fail where it is not declared.
    Without claims the ladder does not ask; the reproduction alone shows it.
    """

    fact: str
    claims: tuple[str, ...] = ()  # "test_08_step.py::test_NAME[case]", the most telling first
    reproduction: str = ""  # a file in reproductions/, without .py
    declared: str = ""


@dataclass(frozen=True)
class Peer:
    """A trainer of others, in one version, and its adapter for the ladder."""

    package: str  # as pip knows it
    version: str
    adapter: str  # "module:Class"
    departures: tuple[Departure, ...]
    built_on: tuple[Peer, ...] = ()  # whose parts it uses: a program may show one of these

    def failing(self) -> set[str]:
        """The claims that fail although the adapter declares what can be declared."""
        return {claim for d in self.departures if not d.declared for claim in d.claims}

    def declared(self) -> list[Departure]:
        return [departure for departure in self.departures if departure.declared]


def grouped(rows: Iterable[tuple[int, str, str]], shown_by: Mapping[str, str]) -> tuple[Departure, ...]:
    """From rows (rung, claim, fact), of which the claim has the rung too, and the program of each fact."""
    claims: dict[str, list[str]] = {}
    for _, claim, fact in rows:
        claims.setdefault(fact, []).append(claim)
    return tuple(Departure(fact, tuple(names), shown_by[fact]) for fact, names in claims.items())
