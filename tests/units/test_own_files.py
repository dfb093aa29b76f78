"""A command rewrites a file of this repository only where git has what is replaced."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.own_files import require_committed, write_own

ROOT = Path(__file__).resolve().parents[2]
IDENTITY = ["-c", "user.name=n", "-c", "user.email=e@example.org"]


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", *IDENTITY, *words], cwd=root, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    (root / "folder").mkdir(parents=True)
    (root / "folder" / "a").write_text("a")
    (root / ".gitignore").write_text("ignored\n")
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "all")
    return root


def test_what_is_committed_or_not_there_is_written(repository: Path) -> None:
    for name in ("folder/a", "folder/new", "another/new"):
        path = repository / name
        require_committed([path])
        write_own(path, b"new")
        assert path.read_bytes() == b"new"
        with pytest.raises(ValueError, match=f"^{path}: is not as in the last commit"):
            require_committed([repository / "b", path])
    git(repository, "add", ".")
    with pytest.raises(ValueError, match="is not as in the last commit"):
        require_committed([repository / "folder" / "a"])
    git(repository, "commit", "-m", "new")
    require_committed([repository / "folder" / "a"])


def test_what_git_ignores_is_not_in_it(repository: Path) -> None:
    (repository / "ignored").write_text("theirs")
    with pytest.raises(ValueError, match="ignored: is not as in the last commit"):
        require_committed([repository / "ignored"])


@pytest.mark.parametrize("name", ["link", "by/a", "nowhere"])
def test_no_link_is_followed(repository: Path, name: str) -> None:
    (repository / "link").symlink_to("folder/a")
    (repository / "by").symlink_to("folder")
    (repository / "nowhere").symlink_to("../outside")
    git(repository, "add", ".")
    git(repository, "commit", "-m", "links")
    with pytest.raises(ValueError, match=f"{name}: is reached through a link"):
        require_committed([repository / name])


def test_outside_of_a_repository_nothing_is_rewritten(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is in none"):
        require_committed([tmp_path / "a"])


def test_the_fixtures_are_written_over_committed_ones_only(repository: Path) -> None:
    for name in (
        "fixtures/make_fixtures.py",
        "fixtures/own_files.py",
        "mlx_impl/__init__.py",
        "mlx_impl/disk/files.py",
    ):
        (repository / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, repository / name)
    command = [sys.executable, "-B", "fixtures/make_fixtures.py"]

    def make() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)

    done = make()
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("written:") == 4
    changed = repository / "fixtures" / "geography" / "test.jsonl"
    git(repository, "add", ".")
    git(repository, "commit", "-m", "fixtures")
    changed.write_text("theirs")
    assert make().returncode == 2
    assert f"error: {changed}: is not as in the last commit" in make().stderr
    assert changed.read_text() == "theirs"
    git(repository, "commit", "-am", "changed")
    assert make().stdout == "written: geography/test.jsonl\n"
