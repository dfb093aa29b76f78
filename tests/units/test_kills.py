"""tests/kills.py kills a process at the chosen call, and only there."""

from __future__ import annotations

import os
from pathlib import Path

from tests.kills import kills, run_killed


def make_and_rename(folder: Path) -> int:
    (folder / "a").mkdir()
    os.replace(folder / "a", folder / "b")
    print("done")
    return 3


def make(folder: Path) -> None:
    folder.mkdir()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_process_is_killed_before_or_after_a_call(tmp_path: Path) -> None:
    for at, when, left in ((1, "before", []), (1, "after", ["a"]), (2, "before", ["a"]), (2, "after", ["b"])):
        folder = tmp_path / f"{at}{when}"
        folder.mkdir()
        ended = run_killed(make_and_rename, folder, at=at, when=when)
        assert ended.was_killed and len(ended.calls) == at and not ended.output
        assert names(folder) == left
        assert ended.calls[0] == f"mkdir {folder / 'a'}"


def test_without_a_call_number_the_process_runs_to_its_end(tmp_path: Path) -> None:
    ended = run_killed(make_and_rename, tmp_path)
    assert (ended.code, ended.was_killed, ended.output, len(ended.calls)) == (3, False, "done\n", 2)


def test_kills_goes_through_all_moments_until_a_run_completes(tmp_path: Path) -> None:
    folder = tmp_path / "a"

    def clean() -> None:
        if folder.exists():
            folder.rmdir()

    assert [folder.exists() for _ in kills(make, folder, before_each=clean)] == [False, True]
