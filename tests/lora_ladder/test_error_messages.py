"""Error messages: a trainer, a dialect or an answer that cannot be judged gives one sentence."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.derived import Divergence, judged, require_same_names
from tests.lora_ladder.capabilities import CAPABILITIES
from tests.lora_ladder.cases import Case, named_case
from tests.lora_ladder.contract import ARRAYS, EACH_UPDATE, LOGITS, NATS, TOKENS
from tests.lora_ladder.here import ALIASES
from tests.lora_ladder.loading import load_trainer
from tests.lora_ladder.protocol import Dialect
from tests.trainers.mlx_impl import MlxTrainer, PlainTrainer
from tests.trainers.reference import ReferenceTrainer

COMPLETE = (
    "class T:\n    dialect = Dialect()\n    logits = loss = gradients = train = factors = base = print\n"
)
MISSING = "the class must have logits, gradients, factors"
MODULES = {
    "with_a_syntax_error": ("class T(:", "SyntaxError: invalid syntax (with_a_syntax_error.py, line 1)"),
    "that_raises": ("raise RuntimeError('no device\\nand more')", "RuntimeError: no device"),
    "that_exits": ("import sys; sys.exit('usage: ...')", "SystemExit: usage: ..."),
    "without_the_class": ("", "AttributeError: module 'without_the_class' has no attribute 'T'"),
    "with_a_function": ("def T(): pass", "must be a class, got function"),
    "with_an_instance": ("T = 3", "must be a class, got int"),
    "with_little": ("class T: dialect = loss = train = base = print", MISSING),
    "with_none": (COMPLETE + "    loss = None", "the class must have loss"),
    "with_a_number": (COMPLETE + "    loss = 3", "loss must be methods"),
    "without_a_dialect": (COMPLETE + "    dialect = None", "the class must have dialect"),
    "with_a_word": (COMPLETE + "    dialect = 'alpha'", "dialect must be a Dialect, got str"),
    "with_another_scale": (
        COMPLETE + "    dialect = Dialect(scale='alpha/rank')",
        "ValueError: scale of a Dialect must be 'alpha / rank' or 'alpha', got 'alpha/rank'",
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_class_that_cannot_be_judged_is_refused_in_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if importing its module raises or exits."""
    text, sentence = MODULES[name]
    (tmp_path / f"{name}.py").write_text(
        f"from tests.lora_ladder.protocol import Dialect\n{text}\n" * bool(text)
    )
    if name == "with_a_syntax_error":
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(pytest.UsageError) as info:
        load_trainer(f"{name}:T")
    assert str(info.value) == f"--trainer {name}:T: {sentence}"


@pytest.mark.parametrize("name", ["./bad.py:T", "folder/bad:T", "bad.py:T", "nonsense", ":T", "bad:", ""])
def test_a_name_other_than_module_and_class_is_refused_in_one_sentence(name: str) -> None:
    """For a path, the sentence says that a module is wanted."""
    with pytest.raises(pytest.UsageError, match="--trainer must be module:Class") as info:
        load_trainer(name)
    assert ("not a path" in str(info.value)) == ("/" in name or ".py" in name)


@pytest.mark.parametrize(
    "said",
    [
        {"scale": "alpha/rank"},
        {"bias_correction": 1},
        {"bias_correction": "no"},
        {"pad_targets": -1},
        {"pad_targets": True},
        {"pad_targets": 1.0},
        {"accumulation": "mean"},
    ],
)
def test_an_unknown_dialect_is_refused(said: dict[str, Any]) -> None:
    """Otherwise it would switch claims off without saying what the trainer does instead."""
    (name,) = said
    with pytest.raises(ValueError, match=f"{name} of a Dialect must be"):
        Dialect(**said)


def test_every_known_dialect_is_accepted() -> None:
    """Also all departures at once."""
    every = Dialect(
        "alpha",
        bias_correction=False,
        pad_targets=2,
        accumulation="mean of means",
        equal="within one rounding",
    )
    assert len(every.departures()) == 5 and Dialect().departures() == []


def answers(**returned: Any) -> Any:
    """A reference trainer whose members of these names return these answers."""
    methods = {name: lambda _self, *given, answer=answer: answer for name, answer in returned.items()}
    return named_case("untied").build(type("Wrong", (ReferenceTrainer,), methods))


@pytest.mark.parametrize(
    ("member", "answer", "must_return", "got"),
    [
        ("loss", None, NATS[0], "NoneType"),
        ("loss", 0.5, NATS[0], "float"),
        ("loss", (1.0, 2, 3), NATS[0], "tuple of 3 (float, int)"),
        ("gradients", [], ARRAYS[0], "list of 0"),
        ("gradients", {"a": 1.0}, ARRAYS[0], "dict in which 'a' is float"),
        ("logits", np.zeros((3, 61)), LOGITS[0], "ndarray of shape (3, 61)"),
        ("train", None, EACH_UPDATE[0], "NoneType"),
        ("train", [1.0], EACH_UPDATE[0], "list of 1 (float)"),
        ("factors", None, ARRAYS[0], "NoneType"),
        ("greedy", np.zeros(3), TOKENS[0], "ndarray of shape (3,)"),
        ("greedy_all", [[1]], "a list of token numbers for each prompt", "list of 1 (list)"),
    ],
)
def test_an_answer_of_the_wrong_kind_is_refused_in_one_sentence(
    case: Case, member: str, answer: Any, must_return: str, got: str
) -> None:
    """It says which member, what it must return and what it returned, and shows no numbers."""
    given: dict[str, list[Any]] = {
        "loss": [case.batch],
        "gradients": [case.batch],
        "logits": [case.batch.inputs_BT],
        "train": [[[case.batch]] * 2, None],
        "greedy": [[1, 2], 3],
        "greedy_all": [[[1], [2]], 3, 0],
    }
    with pytest.raises(Divergence) as info:
        getattr(answers(**{member: answer}), member)(*given.get(member, []))
    assert str(info.value) == f"{member}() must return {must_return}, got {got}"


def test_the_report_says_what_is_not_finite_and_where() -> None:
    """It counts the elements and shows the first of them."""
    ours = np.array([[1.0, np.nan], [np.inf, 1.0]])
    verdict = judged("logits", ours, np.ones((2, 2)), 0.1, "")
    assert verdict.used == np.inf
    words = "logits: not finite: 2 of 4 elements; the first is [0, 1]: expected 1, got nan"
    assert verdict.report == words


def test_three_of_many_missing_names_are_shown() -> None:
    """With the number of the others."""
    with pytest.raises(Divergence, match=r"missing a, b, c and 2 more; unknown z$"):
        require_same_names("factors", {"z": 0}, dict.fromkeys("abcde", 0))


def rows_of_table(heading: str) -> list[list[str]]:
    """The cells of the README table under this heading, without padding."""
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    lines = readme.partition(heading)[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def test_the_readme_lists_every_capability_as_the_protocol_does() -> None:
    """Name, rung and description are equal."""
    wanted = [[name, str(rung), words] for name, (rung, words) in CAPABILITIES.items()]
    rows = rows_of_table("| capability ")
    assert [[name.strip("`"), rung, words] for name, rung, words in rows] == wanted


def test_the_readme_lists_every_field_of_a_dialect_with_its_default() -> None:
    """In the same order."""
    ours = [[field.name, field.default] for field in dataclasses.fields(Dialect)]
    shown = [
        [name.strip("`"), ast.literal_eval(value.strip("`"))]
        for name, value, _ in rows_of_table("| field of")
    ]
    assert shown == ours


def test_the_short_names_load_the_trainers_of_this_project() -> None:
    """`--trainer mlx_impl`, `--trainer plain`, `--trainer reference`."""
    expected = [MlxTrainer, PlainTrainer, ReferenceTrainer]
    assert [load_trainer(name) for name in ALIASES.values()] == expected
