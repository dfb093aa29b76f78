"""`manifest.json`: what a run belongs to, which files it writes, and, once it is finished, what they hold.

It is the first file of a run, so a folder with a manifest that lists no digests holds a run that can be
resumed. A finished run's lists a sha256 for each file: with `--overwrite` those files are removed that still
have it. Replacing the old manifest by the new one is the moment at which the old run ends and the new one
begins: what is left to remove stands in the new one, in case that is interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...disk.files import is_regular, read_json_object, whole_file

NAME = "manifest.json"
FORMAT = "mlx-lora-run-1"
FILES = (  # all that a run writes beside its manifest
    *("config.yaml", "report.json", "metrics.jsonl", "before.json", "training_state.safetensors", "loss.png"),
    *("adapter_config.json", "adapter_model.safetensors"),
    *("best/adapter_config.json", "best/adapter_model.safetensors"),
)
Digests = dict[str, str]  # sha256 by the name of a file in FILES


@dataclass(frozen=True)
class Manifest:
    settings: dict[str, Any]  # as `--config` reads them
    identity: dict[str, Any]  # as the training state has it
    versions: dict[str, str]
    finished: Digests | None = None  # None until the run is finished
    to_remove: Digests = field(default_factory=dict)  # of the run that stood here before
    written: list[str] = field(default_factory=list)  # names that this run has written, or is about to


def read(folder: Path) -> Manifest:
    """ValueError where there is no run of this version."""
    path = folder / NAME
    if not path.exists():
        old = (folder / "training_state.safetensors").exists()
        what = "one of an older version, which cannot be resumed" if old else "none"
        advice = f": begin again from its adapter with --init-adapter {folder}" if old else ""
        raise ValueError(f"{folder}: must hold a run with its {NAME}, and holds {what}{advice}")
    record = read_json_object(path)
    if record.pop("format", None) != FORMAT:
        raise ValueError(f"{path}: must be of the format {FORMAT}, which this version writes")
    try:
        manifest = Manifest(**record)
    except TypeError as error:
        raise ValueError(f"{path}: is not what a run writes: {error}") from None
    objects = (manifest.settings, manifest.identity, manifest.versions, manifest.to_remove)
    finished = {} if manifest.finished is None else manifest.finished
    if not all(isinstance(value, dict) for value in (*objects, finished)) or not isinstance(
        manifest.written, list
    ):
        raise ValueError(f"{path}: is not what a run writes")
    for name in (*finished, *manifest.to_remove, *manifest.written):
        if name not in FILES:
            raise ValueError(f"{path}: a run writes no file {name!r}")
    return manifest


def write(folder: Path, manifest: Manifest) -> None:
    with whole_file(folder / NAME) as part:
        part.write_text(json.dumps({"format": FORMAT, **asdict(manifest)}, indent=2) + "\n", encoding="utf-8")


def finish(folder: Path) -> None:
    """Write down what the files of this run hold."""
    manifest = read(folder)
    digests = {name: digest(folder / name) for name in manifest.written if is_regular(folder / name)}
    write(folder, replace(manifest, finished=digests))


def claim(folder: Path, *names: str) -> None:
    """Write down that the run writes these files, before it does; ValueError for one that is there already.

    So a file of the user's that has such a name is told from one of the run's.
    """
    manifest = read(folder)
    new = [name for name in names if name not in manifest.written]
    for name in new:
        if os.path.lexists(folder / name):
            raise ValueError(f"{folder / name}: was not written by the run in this folder: move it away")
    if new:
        write(folder, replace(manifest, written=[*manifest.written, *new]))


def require_own_files(folder: Path) -> None:
    """ValueError where a name that the run writes, now or later, is taken by something else."""
    written = read(folder).written
    for name in FILES:
        path = folder / name
        if os.path.lexists(path) and name not in written:
            raise ValueError(f"{path}: was not written by the run in this folder: move it away")
        if os.path.lexists(path) and not is_regular(path):
            raise ValueError(f"{path}: must be a regular file, as the run wrote it")


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_unchanged(folder: Path, name: str, sha256: str) -> bool:
    """Whether it is a file of this content, reached through no link."""
    path = folder / name
    is_reached = is_regular(path) and ("/" not in name or not path.parent.is_symlink())
    return is_reached and digest(path) == sha256


def remove_the_run_before(folder: Path) -> None:
    """Remove, one by one, what the run that stood here has left, where it is as that run left it."""
    manifest = read(folder)
    for name, sha256 in manifest.to_remove.items():
        if is_unchanged(folder, name, sha256):
            (folder / name).unlink()
    best = folder / "best"
    if manifest.to_remove and best.is_dir() and not best.is_symlink() and not any(best.iterdir()):
        best.rmdir()
    if manifest.to_remove:
        write(folder, replace(manifest, to_remove={}))
