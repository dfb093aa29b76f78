"""An answer is right if it holds the expected words, whatever their case, accents and punctuation."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from mlx_impl.cli.training import answers
from mlx_impl.cli.training.answers import Answer, ask, fraction_right
from mlx_impl.files.checkpoint import load_model
from mlx_impl.text.conversation import Conversation
from tests.tiny_folder import write_folder

QUESTIONS = [
    Conversation(({"role": "user", "content": text}, {"role": "assistant", "content": "."}), ".", "here")
    for text in ("Who are you?", "The capital of Fiji?", "Which?")
]


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


def test_the_plain_path_asks_one_prompt_at_a_time_by_the_pattern_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It calls nothing of fast/decode.py, and has the same answers."""
    loaded, console = load_model(write_folder(tmp_path)), Console(file=io.StringIO())
    expected = ask(loaded.model, loaded.tokenizer, QUESTIONS, console)
    assert len(expected) == 3 and all(answer.text for answer in expected)
    monkeypatch.delattr(answers, "generate_all")
    assert ask(loaded.model, loaded.tokenizer, QUESTIONS, console, plain=True) == expected
