"""Atomic folders: after a kill at any moment no user file is lost, and the next process cleans up."""

from __future__ import annotations

import json
import os
import platform
import shutil
import stat
import time
from pathlib import Path

import pytest

from mlx_impl.__main__ import main
from mlx_impl.config import LoRAConfig
from mlx_impl.disk.folders import atomic_folder
from mlx_impl.files.adapters import save_adapter
from mlx_impl.files.checkpoint import load_model
from mlx_impl.lora import add_lora
from tests.kills import kills, run_killed
from tests.nightly import mostly_at_night
from tests.tiny_folder import write_folder

# Every fifth moment is tried; the nightly run sets 1 and tries all.
EVERY_KILL = int(os.environ.get("EVERY_KILL", "8"))
Contents = dict[str, bytes | str | None]


def contents(folder: Path) -> Contents:
    """By relative path: the bytes of a file, the target of a link, None for a folder."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else (None if path.is_dir() else path.read_bytes())
        for path in folder.rglob("*")
    }


def fill(target: Path) -> None:
    with atomic_folder(target) as part:
        part.file("a").write_text("a")
        part.file("b.part").write_text("b")
        os.replace(part.path / "b.part", part.file("b"))


def leftover(target: Path, at: int = 7) -> Path:
    """The temporary folder that a killed process left behind."""
    assert run_killed(fill, target, at=at).was_killed
    (part,) = (path for path in target.parent.iterdir() if path.suffix == ".part")
    return part


def test_the_folder_has_the_default_mode_or_keeps_the_old_one(tmp_path: Path) -> None:
    (plain := tmp_path / "plain").mkdir()
    (private := tmp_path / "private").mkdir(mode=0o700)
    for folder in (tmp_path / "out", private):
        fill(folder)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


def test_files_of_file_browsers_are_kept(tmp_path: Path) -> None:
    (target := tmp_path / "out").mkdir()
    (target / ".DS_Store").write_text("theirs")
    fill(target)
    assert contents(tmp_path) == {"out": None, "out/.DS_Store": b"theirs", "out/a": b"a", "out/b": b"b"}


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    fill(tmp_path / "out")
    assert contents(tmp_path) == {"out": "real", "real": None, "real/a": b"a", "real/b": b"b"}


def test_all_files_are_synced_before_the_folder_is_renamed(tmp_path: Path) -> None:
    ended = run_killed(fill, tmp_path / "out", calls=("open", "replace", "fsync"))
    assert ended.code == 0
    moment = max(n for n, call in enumerate(ended.calls) if call.startswith("replace"))
    synchronized = [ended.calls[n - 1] for n in range(moment) if ended.calls[n].startswith("fsync")]
    names = {Path(call.partition(" ")[2]).name for call in synchronized if call.startswith("open")}
    assert {"a", "b"} < names and any(name.endswith(".part") for name in names)
    assert ended.calls[moment + 1] == f"open {tmp_path}" and ended.calls[moment + 2].startswith("fsync")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and an adapter."""
    folder = tmp_path_factory.mktemp("inputs")
    model = load_model(write_folder(folder / "model")).model
    config = LoRAConfig(rank=2, target_modules=("q_proj",))
    add_lora(model, config)
    save_adapter(model, config, folder / "adapter", "tiny")
    return folder / "model", folder / "adapter"


def arguments_of(command: str, inputs: tuple[Path, Path], target: Path) -> list[str]:
    model, adapter = map(str, inputs)
    rest = ["--model", model, "--blas", "off"] if command == "fuse" else ["--to", "mlx-lm"]
    return [command, "--adapter-path", adapter, "--save-path", str(target), *rest]


def write_user_files(work: Path) -> Contents:
    """A user's files whose names look like temporary ones."""
    for name in ("out.partabcdef", ".out.0123456789abcdef.part"):
        (work / name).mkdir()
        (work / name / "config.json").write_text("theirs")
    (work / "x.part").write_text("theirs")
    (work / ".x.0123456789abcdef.part.journal").write_text("theirs")
    return contents(work)


@pytest.mark.parametrize("has_junk", mostly_at_night([False, True], 1), ids=["new", "with .DS_Store"])
@pytest.mark.parametrize("command", ["fuse", "convert"])
def test_a_kill_at_any_moment_loses_nothing_and_the_next_command_cleans_up(
    tmp_path: Path, inputs: tuple[Path, Path], command: str, has_junk: bool
) -> None:
    work, target, before = tmp_path / "work", tmp_path / "work" / "out", contents(inputs[0].parent)
    theirs: Contents = {}

    def fresh() -> None:
        if work.exists():
            shutil.rmtree(work)
        (target if has_junk else work).mkdir(parents=True)
        if has_junk:
            (target / ".DS_Store").write_text("theirs")
        theirs.update(write_user_files(work))

    arguments = arguments_of(command, inputs, target)
    assert main(arguments_of(command, inputs, tmp_path / "whole")) == 0
    whole = {f"out/{name}": value for name, value in contents(tmp_path / "whole").items()}
    count = 0
    for ended in kills(main, arguments, before_each=fresh, every=EVERY_KILL):
        count += 1
        was_done = whole.keys() <= contents(work).keys()
        again = arguments_of(command, inputs, work / "other") if was_done else arguments
        assert run_killed(main, again).code == 0
        left = {name: value for name, value in contents(work).items() if not name.startswith("other")}
        assert left == {"out": None, **whole, **theirs}, ended.calls
    assert count > 30 // EVERY_KILL
    assert contents(inputs[0].parent) == before


def test_a_kill_during_the_cleanup_is_cleaned_up_too(tmp_path: Path) -> None:
    work = tmp_path / "work"

    def fresh() -> None:
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
        leftover(work / "first")

    for ended in kills(fill, work / "out", before_each=fresh, every=EVERY_KILL):
        fill(work / "other")
        left = {path.name for path in work.iterdir()} - {"other", "out"}
        assert not left, ended.calls


def test_a_users_files_in_a_leftover_folder_are_kept(tmp_path: Path) -> None:
    part = leftover(tmp_path / "out")
    (tmp_path / "precious").write_text("theirs")
    (part / "mine").write_text("theirs")
    (part / "a").unlink()
    (part / "a").symlink_to("../precious")
    before = {
        name: value
        for name, value in contents(tmp_path).items()
        if not name.endswith((".journal", "/b.part"))
    }
    fill(tmp_path / "out")
    left = {name: value for name, value in contents(tmp_path).items() if not name.startswith("out")}
    assert left == before


def test_a_leftover_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    part = leftover(tmp_path / "out")
    part.rename(tmp_path / "mine")
    part.symlink_to("mine")
    before = contents(tmp_path / "mine")
    assert before
    fill(tmp_path / "out")
    assert contents(tmp_path / "mine") == before and part.is_symlink()


def test_the_temporary_folder_of_a_live_process_is_not_touched(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as part:
        part.file("a").write_text("a")
        fill(tmp_path / "other")
        assert (part.path / "a").read_text() == "a"
    assert contents(tmp_path / "out") == {"a": b"a"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"target": "../out"}, {"file": "a"}),
        ({"target": "\0"}, {"file": "a"}),
        ({}, {"file": "../precious"}),
        ({}, {"file": "/etc/hostname"}),
        ({}, {"file": ".."}),
        ({}, {"file": "\0"}),
        ({}, {"moved": "a"}),
        ({"writer": "other"}, {"file": "a"}),
        ({"host": "another"}, {"file": "a"}),
        ({"process": 7}, {"more": 1}),
    ],
)
def test_a_foreign_or_forged_journal_removes_nothing(
    tmp_path: Path, first: dict[str, str], second: dict[str, str]
) -> None:
    """Neither a journal of another program nor one that names files outside its folder."""
    header = {"writer": "mlx_impl", "host": platform.node(), "pid": 1, "process": "0" * 16, "target": "out"}
    (part := tmp_path / ".out.0123456789abcdef.part").mkdir()
    for path in (part / "a", tmp_path / "precious"):
        path.write_text("theirs")
    lines = [json.dumps({**header, **first}), json.dumps(second)]
    (tmp_path / f"{part.name}.journal").write_text("\n".join(lines))
    fill(tmp_path / "fresh")
    assert (part / "a").read_text() == (tmp_path / "precious").read_text() == "theirs"


def test_the_temporary_folder_of_another_host_is_kept_for_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = leftover(tmp_path / "out")
    monkeypatch.setattr(platform, "node", lambda: "another")
    fill(tmp_path / "first")
    assert part.exists()
    yesterday = time.time() - 25 * 3600
    os.utime(part.with_name(f"{part.name}.journal"), (yesterday, yesterday))
    fill(tmp_path / "second")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_the_error_names_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Not a directory|File exists") as caught:
        fill(tmp_path / "file" / "out")
    assert caught.value.filename == str(tmp_path / "file" / "out")


def test_long_folder_names_work(tmp_path: Path) -> None:
    fill(tmp_path / ("\U0001f600" * 63))
    fill(tmp_path / ("n" * 255))
    assert len(list(tmp_path.iterdir())) == 2
