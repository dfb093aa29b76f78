"""It names the culprit: after a failure, which part departs, and which known bug gives the same numbers.

The families of observations.py are tried in order, and the first in which the trainer departs from the
reference is looked at. A signature is named only if it explains every value of that family, those that are
right as well. So most bugs that nobody foresaw are *not known*, and what fails and what passes is said.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch

from tests.derived import NUM_DRAWS, noise_of, within
from tests.lora_ladder import signatures_dropout
from tests.lora_ladder.cases import Case, Draw
from tests.lora_ladder.known_bugs import SIGNATURES
from tests.lora_ladder.observations import FAMILIES, Family, Observation
from tests.lora_ladder.plugin import Ladder, is_claimed
from tests.lora_ladder.protocol import Arrays
from tests.lora_ladder.signatures import Hypothesis, Signature, sound
from tests.lora_ladder.trap_notes import seen
from tests.trainers.reference import oracle

RUNGS = (1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15)  # those whose claims are about what is observed here
DROPOUT_RUNGS = (10, 13, 14)
FAR = 2.0**-6  # relative; so far no rounding moves a result, and its noise need not be estimated
FEW_DRAWS, NEAR = 2, 30.0  # beyond so many times a first estimate of its noise none better is needed
OF_LAYERS = (2, 6)  # rungs of signatures of an adapted layer
WIDTH = 80  # of a line of the report

# Keyed by hypothesis, observation, dialect and draw: they are the same for every trainer.
EXPECTED: dict[tuple[object, ...], Arrays] = {}
NOISE: dict[tuple[object, ...], dict[str, float]] = {}


Pairs = list[tuple[Observation, Arrays]]  # observations and a trainer's answers


@dataclass
class Culprit:
    """What was found out about a failure."""

    family: str = ""  # the first in which the trainer departs; empty: in none of them
    fails: list[str] = field(default_factory=list)  # names of its observations
    passes: list[str] = field(default_factory=list)
    named: list[Signature] = field(default_factory=list)  # those that explain all values
    tried: int = 0
    agreed: list[str] = field(default_factory=list, compare=False)  # where nothing departs: what was observed
    not_tried: list[str] = field(default_factory=list, compare=False)  # and what the trainer does not claim


def find(candidate: Any, rung: int = max(RUNGS)) -> Culprit:
    """The first family in which the trainer departs, and the signatures that explain all of it.

    `rung` is the first that failed: families of higher rungs are left out.
    """
    agreed: list[str] = []
    not_tried: list[str] = []
    with quietly():
        for family in FAMILIES:
            if family.first_rung > rung:
                not_tried.append(family.what)
                continue
            answers = without_stand_ins([(o, answer_of(candidate, o)) for o in family.observations()])
            judged = [(o, ours) for o, ours in answers if ours is not None]
            agree = [explains(sound, "", candidate, o, ours) for o, ours in judged]
            if not all(agree):
                return named_in(family, judged, agree, candidate)
            agreed += in_words(family, [o.name for o, _ in judged])
            lacking = [o.name for o, ours in answers if ours is None]
            not_tried += in_words(family, lacking) if judged else [family.what]
        named = dropout(candidate) if rung in DROPOUT_RUNGS else None
    if named:
        return Culprit("dropout", ["the masks that are drawn"], [], named)
    not_tried += ["dropout's own masks"] if named is None else []
    return Culprit(agreed=agreed, not_tried=not_tried)


def in_words(family: Family, names: list[str]) -> list[str]:
    """ "updates (sgd, first update; sgd, clipping)"; the family alone where its cases are architectures."""
    if not names:
        return []
    return [f"{family.what} ({'; '.join(names)})" if "updates" in family.what else family.what]


def without_stand_ins(
    answers: list[tuple[Observation, Arrays | None]],
) -> list[tuple[Observation, Arrays | None]]:
    """Without what is observed only for lack of another answer, where that one is there; and the reverse."""
    there = {o.name for o, ours in answers if ours is not None}
    stand_ins = {o.instead_of for o, ours in answers if o.instead_of and ours is not None}
    return [
        (o, ours)
        for o, ours in answers
        if not (o.instead_of and (o.instead_of in there or ours is None))
        and not (o.name in stand_ins and ours is None)
    ]


@contextmanager
def quietly() -> Iterator[None]:
    """Without warnings, and on one thread: the cases are so small that threads would only wait."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(num_threads)


def dropout(candidate: Any) -> list[Signature] | None:
    """What the law of a trainer's own dropout masks tells; None where they cannot be seen."""
    for named in (signatures_dropout.named, signatures_dropout.named_by_losses):
        try:
            return named(candidate)
        except (Exception, SystemExit):  # it has no dropout, say, or no SGD
            continue
    return None


def named_in(family: Family, judged: Pairs, agree: list[bool], candidate: Any) -> Culprit:
    wrong = [pair for pair, is_right in zip(judged, agree, strict=True) if not is_right]
    wrong.sort(key=lambda pair: pair[0].num_updates)  # the quickest first
    right = [pair for pair, is_right in zip(judged, agree, strict=True) if is_right]
    tried = [signature for signature in SIGNATURES if signature.rung in family.rungs]
    named = [one for one in tried if is_named(one, candidate, wrong, right)]
    highest = max((one.rung for one in named), default=0)  # what lower rungs judge has passed
    named = [one for one in named if one.rung == highest]
    fails, passes = ([o.name for o, _ in some] for some in (wrong, right))
    return Culprit(family.what, fails, passes, named, len(tried))


def is_named(signature: Signature, candidate: Any, wrong: Pairs, right: Pairs) -> bool:
    """Whether it explains all; what fails comes first, because most hypotheses fall there.

    DoRA's layer is a class of its own: where nothing of it fails, a bug of LoRA's layer need not be in it.
    """
    hypothesis, pairs = signature.hypothesis, [*wrong, *right]
    if hypothesis is None:
        return False
    if not any(o.case.lora.use_dora for o, _ in wrong) and signature.rung in OF_LAYERS:
        pairs = [(o, ours) for o, ours in pairs if not o.case.lora.use_dora]
    return all(explains(hypothesis, signature.name, candidate, o, ours) for o, ours in pairs)


def answer_of(candidate: Any, observation: Observation) -> Arrays | None:
    """None where the trainer does not claim this; no array where it breaks, which nothing explains."""
    if observation.needs and not is_claimed(candidate, observation.needs):
        return None
    try:
        return sound(candidate, observation.case, observation.act)
    except NotImplementedError:
        return None
    except (Exception, SystemExit):
        return {}


def explains(
    hypothesis: Hypothesis, name: str, candidate: Any, observation: Observation, ours: Arrays
) -> bool:
    """Whether all answers are those of the hypothesis, within the derived tolerance."""
    right = oracle(candidate.dialect, torch.float64)
    key = (name, hypothesis, observation.name, tuple(ours), candidate.dialect, Draw.number)

    def expected(case: Case) -> Arrays:
        try:
            return hypothesis(right, case, observation.act)
        except Exception:  # the bug cannot be in this case: its shapes do not fit, say
            return {}

    exact = kept(EXPECTED, key, lambda: expected(observation.case))
    if not ours or ours.keys() != exact.keys() or any(ours[n].shape != exact[n].shape for n in exact):
        return False
    if is_within(ours, exact, dict.fromkeys(exact, 0.0), observation):
        return True
    if any(not distance(ours[n], exact[n]) <= FAR * np.linalg.norm(exact[n]) for n in exact):
        return False

    def noise(num_draws: int) -> dict[str, float]:
        draws = (expected(observation.case.moved(seed)) for seed in range(num_draws))
        return kept(NOISE, (num_draws, *key), lambda: noise_of(draws, exact))

    wide = {name: NEAR * value for name, value in noise(FEW_DRAWS).items()}
    return is_within(ours, exact, wide, observation) and is_within(ours, exact, noise(NUM_DRAWS), observation)


def kept(store: dict, key: tuple[object, ...], compute: Callable[[], Any]) -> Any:
    if key not in store:
        store[key] = compute()
    return store[key]


def is_within(ours: Arrays, exact: Arrays, noise: dict[str, float], observation: Observation) -> bool:
    k = observation.longest_sum
    return all(within(n, ours[n], exact[n], noise[n], k).used <= 1 for n in exact)


def distance(ours: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(ours - exact))


@lru_cache(maxsize=1)
def culprit_of(ladder: Ladder) -> Culprit | None:
    """None where nothing failed, after an error or an interruption, or where the rung is about files, say."""
    first = ladder.first_divergence
    if ladder.is_interrupted or first is None or first.is_error or first.rung not in RUNGS:
        return None
    return find(ladder.candidate, first.rung)


def culprit_lines(ladder: Ladder) -> Iterator[str]:
    """The report's lines, of at most 80 columns: what fails, what passes, and the name of the bug."""
    try:
        culprit = culprit_of(ladder)
    except (
        Exception,
        SystemExit,
    ) as error:  # of a trainer that gives no numbers, say: the report must not break
        yield from wrapped(f"culprit: not looked for: {type(error).__name__}")
    else:
        yield from chain.from_iterable(map(wrapped, sentences(culprit) if culprit else ()))


def sentences(culprit: Culprit) -> Iterator[str]:
    if not culprit.family:
        agreed = "; ".join(culprit.agreed) or "nothing could be tried"
        yield f"culprit: not known; on small cases these agree: {agreed}"
        if culprit.not_tried:
            yield f"  not tried: {'; '.join(culprit.not_tried)}"
        return
    yield f"fails ({culprit.family}): {'; '.join(culprit.fails)}"
    if culprit.passes:
        yield f"passes: {'; '.join(culprit.passes)}"
    for number, signature in enumerate(culprit.named):
        yield ("culprit" if not number else "or") + f": {signature.sentence}"
        if signature.dialect:
            yield f"  with {signature.dialect} this passes"
        if signature.link:
            yield f"  {seen(signature.link)}"
    if not culprit.named:
        yield f"culprit: not known; none of {culprit.tried} known bugs explains all of this"


def wrapped(line: str) -> list[str]:
    spaces = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, WIDTH, initial_indent=spaces, subsequent_indent=spaces + "  ")
