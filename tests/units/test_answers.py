"""When an answer is right: the expected words stand in it, whatever their case, accents and punctuation."""

from __future__ import annotations

import pytest

from mlx_impl.cli.training.answers import Answer, share_right


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
def test_a_right_answer(expected: str, text: str) -> None:
    assert Answer("?", expected, text).is_right


@pytest.mark.parametrize(
    ("expected", "text"),
    [("Rabat", "Rabatit"), ("Suva", "Suvarnabhumi"), ("Port Louis", "Louis Port"), ("Lima", "")],
)
def test_a_wrong_answer(expected: str, text: str) -> None:
    """Part of a word is not the word."""
    assert not Answer("?", expected, text).is_right


def test_the_share_of_right_answers() -> None:
    assert share_right([Answer("?", "a", "a"), Answer("?", "a", "b")]) == 0.5
