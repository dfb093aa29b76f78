"""Each peer departs from the reference as the table says, and no otherwise; each departure is shown alone."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.peers import departures
from tests.peers.departure import Departure, Peer
from tests.peers.expected import PEERS

HERE = Path(__file__).parent
REPRODUCTIONS = sorted((HERE / "reproductions").glob("*.py"))
each_peer = pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.package)
each_reproduction = pytest.mark.parametrize("path", REPRODUCTIONS, ids=lambda path: path.stem)

KNOWN, OTHER = "test_05_loss.py::test_known", "test_05_loss.py::test_other"
PEER = Peer("a-peer", "1.0", "module:Class", (Departure("a fact", (KNOWN,), "a_peer_fact"),))


@each_peer
def test_a_peer_departs_as_the_table_says(peer: Peer) -> None:
    """The claims known to fail do, and those that every peer passes pass."""
    sentences, _ = departures.differences(peer, quick=True)
    assert not sentences, "\n".join(sentences)


@each_peer
def test_the_version_is_the_one_that_is_installed_and_pinned(peer: Peer) -> None:
    assert importlib.metadata.version(peer.package) == peer.version
    assert f"{peer.package}=={peer.version}" in (HERE.parents[1] / "tox.ini").read_text(encoding="utf-8")


def climbed(monkeypatch: pytest.MonkeyPatch, *failed: str) -> None:
    """Every climb gives a record in which these claims fail."""
    claims = [{"test": f"tests/lora_ladder/{test}", "outcome": "failed", "reason": "why"} for test in failed]
    monkeypatch.setattr(departures, "climb", lambda *_, **__: {"claims": claims})


@pytest.mark.parametrize(
    ("failed", "sentences"),
    [
        ([KNOWN], []),
        ([], [f"a-peer: {KNOWN} passes now"]),
        ([KNOWN, OTHER], [f"a-peer: {OTHER} fails:\nwhy"]),
    ],
    ids=["as known", "it passes", "another fails"],
)
def test_a_peer_that_changes_either_way_is_reported(
    monkeypatch: pytest.MonkeyPatch, failed: list[str], sentences: list[str]
) -> None:
    climbed(monkeypatch, *failed)
    assert departures.differences(PEER, quick=False)[0] == sentences


def test_a_declared_departure_that_is_none_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = replace(PEER.departures[0], declared="pad_targets")
    climbed(monkeypatch)
    (sentence,), _ = departures.differences(replace(PEER, departures=(declared,)), quick=False)
    assert sentence == f"a-peer: {KNOWN} passes although pad_targets is not declared"


@each_reproduction
def test_a_reproduction_prints_what_it_says(path: Path, tmp_path: Path) -> None:
    """Its last lines are those at the end of its docstring, where expected and got differ."""
    command, environment = [sys.executable, str(path)], {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = promised(path)
    assert said[0].startswith("expected: ")
    assert said[1].startswith("got: ")
    assert said[0].removeprefix("expected: ") != said[1].removeprefix("got: ")
    assert done.stdout.splitlines()[-2:] == said


def promised(path: Path) -> list[str]:
    return (docstring(path).rstrip().splitlines())[-2:]


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


@each_peer
def test_each_departure_has_a_reproduction_that_names_the_peer_and_its_version(peer: Peer) -> None:
    for departure in peer.departures:
        text = docstring(HERE / "reproductions" / f"{departure.reproduction}.py")
        used = tuple(f"{one.package} {one.version} " for one in (peer, *peer.built_on))
        assert text.startswith(used), departure.fact


def test_each_reproduction_shows_a_departure() -> None:
    shown = {departure.reproduction for peer in PEERS for departure in peer.departures}
    assert {path.stem for path in REPRODUCTIONS} == shown


@each_peer
def test_the_document_has_a_row_for_each_departure(peer: Peer) -> None:
    lines = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
    for departure in peer.departures:
        start = f"| {peer.package} {peer.version} | {departure.fact} | "
        assert any(line.startswith(start) for line in lines), start


@pytest.mark.parametrize(
    ("reason", "figure"),
    [
        ("x: worst\n  |error| 0.448, 1.85e+05 of the tolerance 2.42e-06 = 8 x", "0.448 / 2.42e-06"),
        ("x: expected 14\n  |error| 2, tolerance 0 = to the bit", "2 / 0"),
        ("logits must be refused\n  replay: lora-ladder", "logits must be refused"),
        ("test_a_claim[case-2]: nan must be refused\n  loss: 0", "nan must be refused"),
        ("x: 1 of 2 tensors; the first is\n  nats: expected 0, got nan", "nats: expected 0, got nan"),
        ("ValueError: SiLU() is not supported. Only these are", "ValueError: SiLU() is not supported"),
    ],
)
def test_the_table_has_the_error_and_its_tolerance(reason: str, figure: str) -> None:
    assert departures.figure(reason) == figure


def test_an_unknown_peer_is_refused(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        departures.main(["no-peer"])
    assert "a peer must be one of mlx-lm" in capsys.readouterr().err
