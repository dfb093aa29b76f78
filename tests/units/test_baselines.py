"""The second gate of the benchmarks: earlier times of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.baselines import Baselines, cpu_name, fingerprint


def known(path: Path, replaced: bool = False) -> Baselines:
    path.write_text(json.dumps({"step": 1.0}))
    return Baselines(path, replaced)


def test_a_benchmark_slower_by_more_than_a_tenth_is_reported(tmp_path: Path) -> None:
    baselines = known(tmp_path / "baseline.json")
    assert baselines.compare("step", 1.09) is None
    assert "1.11 times the 1 s" in (baselines.compare("step", 1.11) or "")


def test_known_times_stay_unless_replacing_is_requested(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    for replaced, kept in ((False, 1.0), (True, 3.0)):
        baselines = known(path, replaced)
        baselines.compare("step", 3.0)
        baselines.compare("new", 2.0)
        baselines.write()
        assert json.loads(path.read_text()) == {"step": kept, "new": 2.0}


@pytest.mark.parametrize("content", ["{", "[1]", '{"step": "fast"}', '{"step": null}'])
def test_a_file_that_is_not_a_baseline_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"baseline\.json: must be"):
        Baselines(path)
    assert path.read_text() == content


def test_a_different_number_of_cores_is_a_different_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    here = fingerprint()
    assert fingerprint() == here and cpu_name()
    monkeypatch.setattr("os.cpu_count", lambda: 1000)
    assert fingerprint() != here
    assert all(c.isalnum() or c == "-" for c in here)
