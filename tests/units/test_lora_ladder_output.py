"""What `lora-ladder` writes: where it may, and nothing that a browser or a terminal would obey."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import pytest

from tests.lora_ladder.command import main
from tests.lora_ladder.output import printable
from tests.trainers.reference import ReferenceTrainer

CLAIM = "test_02_layer.py::test_the_trainable_count_is_rank_times_inputs_plus_outputs[untied]"
RED = "\x1b[31mred\x1b[0m"
LINK = "\x1b]8;;https://example.org\x1b\\a link\x1b]8;;\x07"


class Colours(ReferenceTrainer):
    optimizer_from = RED

    def factors(self) -> dict:
        raise ValueError(f"{RED} {LINK} \x00\x7f\x9b2J\ttab")


def test_a_claim_may_stand_before_or_after_the_options(tmp_path: Path) -> None:
    for number, arguments in enumerate((["--quick", CLAIM], [CLAIM, "--quick"])):
        file = tmp_path / f"{number}.json"
        assert main(["reference", *arguments, "--json", str(file)]) == 0
        assert file.read_text().count('"outcome"') == 1


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_report_that_cannot_be_written_is_refused_before_the_climb(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such a folder, or such a name; and the try leaves nothing behind."""
    assert main(["reference", CLAIM, option, str(tmp_path / ("long" * 100))]) == 2
    out, err = capsys.readouterr()
    assert "could not be written: File name too long" in err and not out
    assert main(["reference", CLAIM, option, "/proc/climb.html"]) == 2
    assert not capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_link_to_nowhere_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it leads to would be made, and is not the report's."""
    link = tmp_path / "link.html"
    link.symlink_to(tmp_path / "not_there")
    assert main(["reference", CLAIM, "--html", str(link)]) == 2
    assert not capsys.readouterr().out and link.is_symlink() and not link.exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (RED, "red"),
        (LINK, "a link"),
        ("\x1b[1;38;5;9mbold\x1b[m", "bold"),
        ("a\x00b\x07c\x7fd\x85e\u202ef", "abcdef"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x9b31mred", "red"),
        ("progress\r", "progress"),
        ("\x1b", ""),
    ],
)
def test_what_a_terminal_obeys_is_left_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_neither_the_page_nor_the_screen_has_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "climb.html"
    assert main([f"{__name__}:Colours", CLAIM, "--html", str(file)]) == 1
    for text in (file.read_text(), capsys.readouterr().out):
        assert "red a link" in text
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]|\[31m", text)


def test_the_page_allows_its_own_style_and_nothing_else(tmp_path: Path) -> None:
    """By a Content-Security-Policy with the hash of the style."""
    file = tmp_path / "climb.html"
    assert main(["reference", CLAIM, "--html", str(file)]) == 0
    html = file.read_text()
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', html)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert policy and style
    digest = b64encode(sha256(style[1].encode()).digest()).decode()
    assert (
        policy[1] == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert html.index("Content-Security-Policy") < html.index("<style>") and "style=" not in html
