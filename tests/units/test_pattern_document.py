"""mlx_impl/README.md: its code runs as it stands, and whatever it names is there."""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import io
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import mlx_impl
from mlx_impl.cli.parser import command_parsers, make_parser
from mlx_impl.cli.training import manifest
from mlx_impl.files import checkpoint
from tests.tiny_folder import write_folder

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mlx_impl"
DOCUMENT = PACKAGE / "README.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
WIDTH = 120

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$(?:\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
PROSE = BLOCK.sub("", TEXT)
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
LINKS = [(" ".join(shown.split()), target) for shown, target in LINK.findall(PROSE)]
NAMES = sorted({(shown.strip("`"), target) for shown, target in LINKS if shown.startswith("`")})
STEPS = re.findall(r"^### (\d+\. .*?)\n(.*?)(?=^##)", TEXT, re.MULTILINE | re.DOTALL)
FOLDERS = PROSE[PROSE.index("## The folders") : PROSE.index("## Your own model and data")]
COMMANDS = command_parsers(make_parser())
OF_OTHER_PROGRAMS = {"--no-deps", "--backend", "--hostfile", "--logdir"}


class Block(NamedTuple):
    """A Python block, with the line it begins at and the output that the document shows."""

    line: int
    code: str
    output: str


def python_blocks() -> Iterator[Block]:
    for match in BLOCK.finditer(TEXT):
        language, code, output = match.groups()
        if language == "python":
            yield Block(TEXT.count("\n", 0, match.start(2)), code, output or "")


@pytest.fixture
def tiny_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block loads the default model and reads a fixture; a tiny model takes that one's place."""
    gc.collect()  # the document measures memory
    tiny = checkpoint.load_model(write_folder(tmp_path))
    monkeypatch.setattr(mlx_impl, "load_model", lambda path: tiny)
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path / "adapter"))
    monkeypatch.setenv("MLX_IMPL_BLAS", "off")
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("tiny_default_model")
def test_the_code_runs_as_it_stands_and_prints_what_is_shown() -> None:
    """All blocks in order, in one namespace; a traceback has the document's line numbers."""
    namespace: dict[str, Any] = {"__name__": "document"}
    blocks = list(python_blocks())
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * block.line + block.code, str(DOCUMENT), "exec"), namespace)
        if block is not blocks[-1]:
            assert printed.getvalue() == block.output, f"printed by the block at line {block.line + 1}"
    losses, answer = printed.getvalue().splitlines()[:3], printed.getvalue().split("\n", 3)[3]
    assert [line.split()[0] for line in losses] == ["1", "2", "3"] and answer  # of the last block


def test_the_steps_are_those_of_training() -> None:
    assert [int(title.split(".")[0]) for title, _ in STEPS] == list(range(1, 13))


@pytest.mark.parametrize(("title", "text"), STEPS, ids=[title for title, _ in STEPS])
def test_a_step_has_code_a_trap_and_its_place_in_both_packages(title: str, text: str) -> None:
    paragraph = text.strip().partition("\n\n")[0]
    assert 3 <= len(re.findall(r"[.](?=\s|$)", paragraph)) <= 9, title
    _, _, trap_and_place = text.partition("```python\n")[2].partition("**Trap.**")
    trap, _, place = trap_and_place.partition("**Code.**")
    assert "](../tests/traps/test_trap_" in trap
    assert re.search(r"`\]\(\w+\.py\)", place)
    assert "](../reference/" in place or "There is no twin" in place


@pytest.mark.parametrize("target", sorted({target for _, target in LINKS}))
def test_every_link_leads_somewhere(target: str) -> None:
    path, _, anchor = target.partition("#")
    assert (PACKAGE / path).exists()
    headings = re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    assert not anchor or anchor in {anchor_of(heading) for heading in headings}


def anchor_of(heading: str) -> str:
    """GitHub's rule: lower case, punctuation left out, blanks as hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize(("name", "target"), NAMES, ids=[f"{target}:{name}" for name, target in NAMES])
def test_a_name_in_a_link_is_defined_in_that_file(name: str, target: str) -> None:
    assert name in names_defined_in(PACKAGE / target)


@cache
def names_defined_in(path: Path) -> frozenset[str]:
    """Functions, classes and values of a module; methods as `Class.method`."""
    return frozenset(defined(ast.parse(path.read_text(encoding="utf-8")).body))


def defined(statements: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            yield prefix + statement.name
        if isinstance(statement, ast.ClassDef):
            yield from defined(statement.body, f"{statement.name}.")
        if isinstance(statement, ast.Assign):
            yield from (prefix + t.id for t in statement.targets if isinstance(t, ast.Name))


def test_every_error_message_is_shown_by_a_trap_of_its_step() -> None:
    found = 0
    for title, text in STEPS:
        traps = {target for _, target in LINK.findall(text) if "/traps/" in target}
        sources = "".join((PACKAGE / trap).read_text(encoding="utf-8") for trap in traps).replace("\\", "")
        for message in re.findall(r"`\w+Error: ([^`]+)`", text):
            assert " ".join(message.split()) in sources, title
            found += 1
    assert found >= 5


def test_every_module_is_in_the_list_of_folders_once() -> None:
    listed = [target for _, target in LINK.findall(FOLDERS) if not target.startswith("..")]
    modules = [str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")]
    assert sorted(listed) == sorted(name for name in modules if not name.endswith("__init__.py"))


@pytest.mark.parametrize("command", re.findall(r"^python -m mlx_impl ([^#\n]+)", TEXT, re.MULTILINE))
def test_every_command_shown_can_be_parsed(command: str) -> None:
    assert isinstance(make_parser().parse_args(shlex.split(command)), argparse.Namespace)


def test_every_flag_shown_is_one() -> None:
    shown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT)) - OF_OTHER_PROGRAMS
    parsers = (make_parser(), *COMMANDS.values())
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    assert shown - known == {"--help"} - known


def test_every_file_of_a_run_is_listed() -> None:
    listed = TEXT.partition("## The run's folder")[2].partition("## Stopping")[0]
    names = {manifest.NAME, *(Path(file).name for file in manifest.FILES)}
    assert [name for name in sorted(names) if f"`{name}`" not in listed] == []


@pytest.mark.parametrize(
    "term",
    [
        *("unpadding", "padding-free", "prefix sharing", "gradient accumulation", "micro-batch"),
        *("attention mask", "position ids", "peak learning rate", "chunked cross-entropy"),
        *("bit-exact resume", "shape bucket", "key/value cache", "gradient checkpointing", "atomic write"),
    ],
)
def test_a_reader_who_searches_for_a_term_of_the_field_finds_it(term: str) -> None:
    assert term in " ".join(PROSE.lower().split())


def test_no_line_is_wider_than_the_documents_width() -> None:
    assert [line for line in TEXT.splitlines() if len(line) > WIDTH] == []
