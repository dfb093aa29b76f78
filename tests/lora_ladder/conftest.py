"""The ladder in pytest: its options, its report, and the fixtures that every rung uses."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import pytest

from tests.lora_ladder.cases import SPEC as SPEC
from tests.lora_ladder.cases import Case, Draw, named_case
from tests.lora_ladder.here import ALIASES, DEFAULT_TRAINER, FOLDER
from tests.lora_ladder.judge import Judge
from tests.lora_ladder.loading import load_trainer
from tests.lora_ladder.patched import PutsBack
from tests.lora_ladder.plugin import MARKERS, Ladder
from tests.lora_ladder.summary import header_lines, summary_lines

LADDER = pytest.StashKey[Ladder]()
FROM_WORKER = pytest.StashKey[list[str]]()
SUMMARY = "ladder"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ladder")
    group.addoption(
        "--trainer",
        metavar="MODULE:CLASS",
        help=f"or {' or '.join(ALIASES)}; default: $LADDER_TRAINER, or {next(iter(ALIASES))}",
    )
    group.addoption(
        "--draw",
        type=int,
        default=0,
        metavar="N",
        help="other random weights, factors and rows: 1, 2, ...; default: 0, which the documents show",
    )
    group.addoption("--keep-going", action="store_true", help="also judge rungs above a failed one")


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    name = config.getoption("--trainer", None) or os.environ.get("LADDER_TRAINER") or DEFAULT_TRAINER
    name = ALIASES.get(name, name)
    draw = config.getoption("--draw", 0)
    ladder = Ladder(name, load_trainer(name), config.getoption("--keep-going", False), draw)
    if config.rootpath == FOLDER:
        ladder.command = "lora-ladder"
    config.stash[LADDER] = ladder
    config.pluginmanager.register(ladder, "ladder")
    if name not in ALIASES.values() and not getattr(ladder.candidate, "keeps_patches", False):
        config.pluginmanager.register(PutsBack())
    settings = ExitStack()
    settings.enter_context(Draw.set_to(draw))
    config.add_cleanup(settings.close)


def pytest_report_header(config: pytest.Config) -> list[str]:
    return header_lines(config.stash[LADDER])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under pytest-xdist, a worker hands its summary to the process that prints."""
    ladder = session.config.stash[LADDER]
    if ladder.outcomes and hasattr(session.config, "workeroutput"):
        session.config.workeroutput[SUMMARY] = list(summary_lines(ladder))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    lines = getattr(node, "workeroutput", {}).get(SUMMARY)
    if lines:
        node.config.stash[FROM_WORKER] = lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    ladder = config.stash[LADDER]
    if ladder.command == "lora-ladder":
        return  # the command shows it, and writes its reports even if the search for a culprit is interrupted
    lines = list(summary_lines(ladder)) if ladder.outcomes else config.stash.get(FROM_WORKER, [])
    if lines:
        terminalreporter.section(f"ladder: {ladder.trainer}")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture
def ladder(pytestconfig: pytest.Config) -> Ladder:
    return pytestconfig.stash[LADDER]


@pytest.fixture
def candidate(ladder: Ladder) -> Any:
    """The class of the trainer under test."""
    return ladder.candidate


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    """The case "untied", with plain LoRA, unless the test is parametrized with another."""
    return named_case(getattr(request, "param", "untied"))


@pytest.fixture
def judge(request: pytest.FixtureRequest, ladder: Ladder) -> Judge:
    return Judge(ladder, request.node.nodeid)
