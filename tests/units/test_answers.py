"""An answer is right if it holds the expected words, whatever their case, accents and punctuation."""

from __future__ import annotations

import pytest

from mlx_impl.cli.training.answers import Answer, fraction_right


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ("Suva", "The capital of Fiji is Suva."),
        ("Yaound\u00e9", "It is YAOUNDE"),
        ("Yaounde", "Yaound\u00e9!"),
        ("Port of Spain", "port-of-spain"),
        ("N'Djamena", "N\u2019Djam\u00e9na, on the Chari"),
    ],
)
def test_an_answer_with_the_expected_words_is_right(expected: str, text: str) -> None:
    assert Answer("?", expected, text).is_right


@pytest.mark.parametrize(
    ("expected", "text"),
    [("Rabat", "Rabatit"), ("Suva", "Suvarnabhumi"), ("Port Louis", "Louis Port"), ("Lima", "")],
)
def test_an_answer_without_the_expected_words_is_wrong(expected: str, text: str) -> None:
    """A part of a longer word does not count."""
    assert not Answer("?", expected, text).is_right


def test_fraction_right_counts_the_right_answers() -> None:
    assert fraction_right([Answer("?", "a", "a"), Answer("?", "a", "b")]) == 0.5
