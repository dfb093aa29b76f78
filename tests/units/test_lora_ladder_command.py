"""The command `lora-ladder`: what it refuses, its exit status, its files, and the adapter that it begins."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.lora_ladder.capabilities import CAPABILITIES
from tests.lora_ladder.command import main
from tests.lora_ladder.protocol import REQUIRED, Batch, Dialect
from tests.trainers.reference import ReferenceTrainer

ROOT = Path(__file__).resolve().parents[2]
HERE = __name__
LOSS = "test_05_loss.py::test_"
# A few claims of which the wrong trainer below passes one, fails two, raises in one, and does not claim one.
CLAIMS = (
    "test_02_layer.py::test_the_trainable_count_is_rank_times_inputs_plus_outputs[untied]",
    f"{LOSS}the_loss_equals_the_reference[untied]",
    f"{LOSS}the_targets_are_the_tokens_after_the_prompts",
    f"{LOSS}a_row_without_targets_adds_nothing_to_the_loss",
    f"{LOSS}a_hand_worked_example",
)


class Small(ReferenceTrainer):
    """The seven members and one more, so that a rung is quick."""

    loss_of_logits = None  # type: ignore[assignment]


class Sound(Small):
    optimizer_from = "torch.optim, made by the adapter"


class CountsPadding(Small):
    """Wrong everywhere, and an error in a text that looks like HTML where rows have no target."""

    def loss(self, batch: Batch) -> tuple[float, int]:
        nats, num_targets = super().loss(batch)
        if not batch.mask_BT[1].any():
            raise KeyError("<script>alert(1)</script> & more \udce9")
        return nats, num_targets + 1


def is_not_there(*given: object) -> None:
    raise NotImplementedError("not there")


class ClaimsNothing(Small):
    loss = logits = gradients = train = factors = is_not_there  # type: ignore[assignment]


class Exits(Small):
    """Its loss ends the program, with the exit code of success; its text has half a surrogate pair."""

    def loss(self, batch: Batch) -> tuple[float, int]:
        raise SystemExit(0)

    def gradients(self, batch: Batch) -> Any:
        raise ValueError("a name \udce9")


class ForgetsAName(Small):
    def loss(self, batch: Batch) -> tuple[float, int]:
        return self.weights["lm_head.weight"]  # type: ignore[attr-defined]


class Asserts(Small):
    def loss(self, batch: Batch) -> tuple[float, int]:
        assert len(batch.mask_BT) == 0, "the trainer asserts"
        return super().loss(batch)


class AssertsBelow(Small):
    """In a module of the trainer, here PyTorch."""

    def loss(self, batch: Batch) -> tuple[float, int]:
        torch.testing.assert_close(torch.zeros(1), torch.ones(1))
        return super().loss(batch)


def climbed(trainer: type, folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    file = folder / "climb.json"
    status = main([f"{HERE}:{trainer.__name__}", *CLAIMS, "--json", str(file), *options])
    return status, json.loads(file.read_text())


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    """A climb that fails: exit status, record and page."""
    folder = tmp_path_factory.mktemp("wrong")
    status, record = climbed(CountsPadding, folder, "--html", str(folder / "climb.html"))
    return status, record, (folder / "climb.html").read_text()


@pytest.mark.parametrize(
    ("trainer", "sentence"),
    [
        ("nonsense", "the trainer must be module:Class"),
        ("./my_adapter.py:T", "with a module as import has it, not a path"),
        ("no_such_module:T", "No module named 'no_such_module'"),
        (f"{HERE}:Sonud", "has no attribute 'Sonud'"),
        (f"{HERE}:Path", "the class must have dialect, logits, loss, gradients, train, factors, base"),
    ],
)
def test_a_trainer_that_cannot_be_judged_is_refused_in_one_sentence(
    trainer: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([trainer]) == 2
    out, err = capsys.readouterr()
    assert sentence in err and err.startswith("lora-ladder: ") and len(err.splitlines()) == 1 and not out


@pytest.mark.parametrize("rungs", ["20", "5-", "x", "7-3"])
def test_rungs_that_are_not_there_are_refused(rungs: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{HERE}:Sound", "--rungs", rungs]) == 2
    assert "--rungs must be N or N-M" in capsys.readouterr().err


def test_a_draw_below_0_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{HERE}:Sound", "--draw", "-1"]) == 2
    assert capsys.readouterr().err == "lora-ladder: --draw must be at least 0, got -1\n"


def test_a_claim_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{HERE}:Sound", "conftest.py::test_a"]) == 2
    assert main([f"{HERE}:Sound", "test_05_loss.py::test_no_such"]) == 2
    conftest, no_such = capsys.readouterr().err.splitlines()
    assert "a claim must be FILE::TEST as a replay names it" in conftest
    assert "there is no claim test_no_such" in no_such


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["referense"], "got 'referense'; did you mean reference?"),
        (["run", "--help"], "the trainer must be module:Class"),
        ([f"{HERE}:Sonud", CLAIMS[0]], "did you mean Sound?"),
        (
            [f"{HERE}:Sound", CLAIMS[4].replace("worked", "wroked")],
            "did you mean test_a_hand_worked_example?",
        ),
        ([f"{HERE}:Sound", "test_a_hand_wroked_example"], f"did you mean {CLAIMS[4]}?"),
        ([f"{HERE}:Sound", "test_05_lass.py::test_a"], "did you mean test_05_loss.py?"),
        ([f"{HERE}:Sound", CLAIMS[1].replace("untied", "untide")], "did you mean untied?"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_nearest(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no command but `init`; a bare word is none, whatever follows it."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert sentence in err and len(err.splitlines()) == 1 and not out


def test_a_mistyped_option_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([f"{HERE}:Sound", "--qiuck"])
    assert "unrecognized arguments: --qiuck; did you mean --quick?" in capsys.readouterr().err


MISTAKES = (
    ["run"],
    ["no_such:T"],
    ["reference", "--rungs", "20"],
    ["reference", "test_a"],
    ["slow_adapter:MyTrianer"],
)


def test_a_mistake_is_refused_before_pytorch_pytest_and_numpy_are_imported(tmp_path: Path) -> None:
    (tmp_path / "slow_adapter.py").write_text("import torch\nclass MyTrainer: ...\n")
    program = (
        "import sys; from tests.lora_ladder.command import main\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        f"for arguments in {MISTAKES}: assert main(arguments) == 2\n"
        "for option in ('--help', '--version'):\n"
        "    try: main([option])\n    except SystemExit as end: assert not end.code\n"
        "assert {'torch', 'pytest', 'numpy', 'mlx'}.isdisjoint(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "there is no class MyTrianer in" in done.stderr and "; did you mean MyTrainer?" in done.stderr


def test_a_sound_trainer_ends_with_0_and_the_screen_shows_the_rung_and_who_made_the_optimizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, record = climbed(Sound, tmp_path)
    out = capsys.readouterr().out
    assert (
        status == 0
        and record["counts"]["passed"] == 4
        and record["verdict"] == "no divergence"
        and record["first_divergence"] is None
    )
    assert (
        re.search(r"^   5 loss +3 passed, 1 not claimed", out, re.MULTILINE)
        and "\nno divergence in what was judged: 4 claims of rungs 2, 5\n" in out
    )
    assert "optimizer from: torch.optim, made by the adapter" in out
    assert record["schedule_from"] == "not said"


def test_a_divergence_ends_with_1(wrong: tuple[int, dict[str, Any], str]) -> None:
    status, record, _ = wrong
    first = record["first_divergence"]
    assert status == 1 and record["verdict"] == "first divergence"
    assert (first["rung"], first["title"]) == (5, "loss")
    assert any("expected 14, got 15" in line for line in first["report"])


def test_a_trainer_that_exits_with_0_fails(tmp_path: Path) -> None:
    """Also while the culprit is looked for; the record is written."""
    status, record = climbed(Exits, tmp_path)
    assert status == 1 and record["first_divergence"]["rung"] == 5


def test_a_report_that_the_screen_cannot_encode_is_written_and_shown(tmp_path: Path) -> None:
    file = tmp_path / "climb.json"
    claim = "test_06_gradient.py::test_every_gradient_equals_the_reference[untied]"
    command = [sys.executable, "-m", "tests.lora_ladder", f"{HERE}:Exits", claim, "--json", str(file)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert json.loads(file.read_text())["verdict"] == "first divergence"


def test_what_excludes_one_another_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "one")
    assert main([f"{HERE}:Sound", "--json", file, "--html", file]) == 2
    assert "--json and --html must be two files" in capsys.readouterr().err
    assert main([f"{HERE}:Sound", CLAIMS[0], "--rungs", "2"]) == 2
    assert "give claims or --rungs, not both" in capsys.readouterr().err


def test_passed_failed_not_claimed_and_error_are_four_words(wrong: tuple[int, dict[str, Any], str]) -> None:
    _, record, _ = wrong
    assert record["schema"] == 1
    assert (
        {"failed", "error", "not claimed"}
        <= set(record["counts"])
        <= {"passed", "failed", "error", "not claimed"}
    )
    errors = [claim for claim in record["claims"] if claim["outcome"] == "error"]
    assert errors and all(claim["reason"].startswith("KeyError: ") for claim in errors)
    failed = [claim for claim in record["claims"] if claim["outcome"] == "failed"]
    assert failed and all("Error" not in claim["reason"] for claim in failed)
    assert sum(record["counts"].values()) == len(record["claims"])


def test_nothing_judged_ends_with_3(tmp_path: Path) -> None:
    status, record = climbed(ClaimsNothing, tmp_path)
    assert status == 3 and record["counts"] == {"not claimed": 5}


def test_the_replay_tries_this_claim_alone(wrong: tuple[int, dict[str, Any], str], tmp_path: Path) -> None:
    """As it is printed, with the shell's quotes."""
    program, *arguments = shlex.split(wrong[1]["first_divergence"]["replay"])
    assert program == "lora-ladder"
    file = tmp_path / "again.json"
    assert main([*arguments, "--json", str(file)]) == 1
    assert [claim["outcome"] for claim in json.loads(file.read_text())["claims"]] == ["failed"]


def test_the_page_escapes_what_comes_from_the_trainer(wrong: tuple[int, dict[str, Any], str]) -> None:
    page = wrong[2]
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page


def test_the_page_is_light_or_dark_fits_a_phone_and_loads_nothing(
    wrong: tuple[int, dict[str, Any], str],
) -> None:
    page = wrong[2]
    assert "color-scheme: light dark" in page and "@media (prefers-color-scheme: dark)" in page
    assert "width=device-width" in page
    assert not re.search(r"\b(src|href)=|url\(|@import", page)


def test_the_screen_and_the_page_say_how_much_of_a_tolerance_was_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the ladder runs by itself, the name of a claim has no folder."""
    assert main([f"{HERE}:Sound", CLAIMS[1], "--html", str(tmp_path / "climb.html")]) == 0
    said = re.search(r"   5 loss +1 passed +at most (\d+%) of tolerance \(nats\)", capsys.readouterr().out)
    assert said
    assert f"<td>{said[1]} (nats)</td>" in (tmp_path / "climb.html").read_text()


def test_the_page_says_what_was_judged_what_passes_and_how_to_replay(
    wrong: tuple[int, dict[str, Any], str],
) -> None:
    _, record, page = wrong
    assert "The first divergence is at rung 5, loss" in page and "expected 14, got 15" in page
    assert "optimizer from" in page and "not said" in page
    assert f"{record['counts']['error']} error" in page
    assert "<pre>lora-ladder " in page


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_report_replaces_no_other_file(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so before anything is judged."""
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    assert main([f"{HERE}:Sound", *CLAIMS, option, str(mine)]) == 2
    assert main([f"{HERE}:Sound", *CLAIMS, option, str(tmp_path)]) == 2
    assert main([f"{HERE}:Sound", *CLAIMS, option, str(tmp_path / "no" / "report")]) == 2
    assert mine.read_text() == "mine" and capsys.readouterr().out == ""


def test_a_report_may_replace_a_report(tmp_path: Path) -> None:
    options = ("--html", str(tmp_path / "climb.html"))
    assert [climbed(ClaimsNothing, tmp_path, *options)[0] for _ in range(2)] == [3, 3]


def test_init_writes_an_adapter_that_can_be_judged_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every required member is there and explained; nothing is claimed until it is filled in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["init", "begun_adapter.py"]) == 0
    text = (tmp_path / "begun_adapter.py").read_text()
    assert all(f"def {name}(" in text for name in REQUIRED[1:])
    assert all(f"Dialect({name}=" in text for name in vars(Dialect()))
    assert capsys.readouterr().out.endswith("lora-ladder begun_adapter:MyTrainer\n")
    assert main(["begun_adapter:MyTrainer", *CLAIMS]) == 3


def test_init_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a file nor what a link leads to."""
    mine, link = tmp_path / "mine.py", tmp_path / "link.py"
    mine.write_text("mine")
    link.symlink_to(tmp_path / "not_there.py")
    for path in (mine, link, tmp_path / "no" / "folder.py", tmp_path / "not-a-module.py"):
        assert main(["init", str(path)]) == 2
    assert mine.read_text() == "mine" and {p.name for p in tmp_path.iterdir()} == {"mine.py", "link.py"}
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_help_says_what_can_climb_and_what_each_option_asks(capsys: pytest.CaptureFixture[str]) -> None:
    """At once, also the fields of a dialect and the exit status."""
    with pytest.raises(SystemExit) as info:
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert info.value.code == 0
    assert (
        "decoders like Llama" in said
        and "Hugging Face names" in said
        and "Exit status: 0 no divergence" in said
    )
    assert all(
        f"{name} {rung} {' '.join(words.split())}" in said for name, (rung, words) in CAPABILITIES.items()
    )
    assert all(f"{name}=" in said for name in vars(Dialect())) and all(name in said for name in REQUIRED)


def test_the_version_is_shown_with_those_of_what_it_computes_with(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(["--version"])
    said = capsys.readouterr().out
    assert info.value.code == 0 and said.startswith("lora-ladder ")
    assert (
        f", torch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}\n" in said
    )


def test_the_screen_tells_errors_from_wrong_results(capsys: pytest.CaptureFixture[str]) -> None:
    """Each has its number in the line of the rung; an error has no culprit."""
    assert main([f"{HERE}:CountsPadding", *CLAIMS]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^   5 loss +2 failed, 1 error, 1 not claimed", out, re.MULTILINE), out
    assert main([f"{HERE}:ForgetsAName", CLAIMS[1]]) == 1
    assert "culprit" not in capsys.readouterr().out


def test_an_error_is_reported_with_its_place_in_the_adapter(tmp_path: Path) -> None:
    """File, line and function, since no traceback is shown."""
    first = climbed(ForgetsAName, tmp_path)[1]["first_divergence"]
    assert first["outcome"] == "error"
    assert re.fullmatch(r"tests/units/test_lora_ladder_command.py:\d+, in loss", first["raised_at"])
    assert f"  raised at {first['raised_at']}" in first["report"]


@pytest.mark.parametrize("trainer", [Asserts, AssertsBelow])
def test_an_assertion_of_the_trainer_is_an_error_with_its_place(trainer: type, tmp_path: Path) -> None:
    """As any other exception is: the ladder's own assertions alone are about results."""
    _, record = climbed(trainer, tmp_path)
    first = record["first_divergence"]
    assert record["counts"]["error"] == 3 and "failed" not in record["counts"]
    assert re.fullmatch(r"tests/units/test_lora_ladder_command.py:\d+, in loss", first["raised_at"])
    assert first["report"][1].startswith("  AssertionError: ")


def test_the_reference_climbs_by_its_short_name() -> None:
    """A first try without an adapter."""
    assert main(["reference", CLAIMS[0]]) == 0
