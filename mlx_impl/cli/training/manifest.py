"""`manifest.json`: a run's settings, the files that it writes and, once it is finished, their sha256 digests.

The manifest is a run's first file. Without digests it marks a run that can be resumed. With `--overwrite`
only files that still have their digest are removed. Replacing the old manifest by the new one is the moment
at which the old run ends and the new one starts; the new one lists the old files that are still to be
removed, so that an interrupted removal can be completed.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...disk.files import atomic_write, is_regular, read_json_object

NAME = "manifest.json"
FORMAT = "mlx-lora-run-1"
FILES = (  # all files of a run except its manifest
    *("config.yaml", "report.json", "report.html", "metrics.jsonl", "before.json", "loss.png"),
    "training_state.safetensors",
    *("adapter_config.json", "adapter_model.safetensors"),
    *("best/adapter_config.json", "best/adapter_model.safetensors"),
    *("chat_template.jinja", "best/chat_template.jinja"),
)
Digests = dict[str, str]  # sha256 by the name of a file in FILES


@dataclass(frozen=True)
class Manifest:
    settings: dict[str, Any]  # as `--config` reads them
    identity: dict[str, Any]  # as in the training state; must match on resume
    versions: dict[str, str]  # of the libraries that compute
    finished: Digests | None = None  # None until the run is finished
    to_remove: Digests = field(default_factory=dict)  # files of the run that this one replaces
    written: list[str] = field(default_factory=list)  # files that this run has written or is about to write


def read(folder: Path) -> Manifest:
    """The manifest; ValueError where the folder holds no run, or one of another version."""
    path = folder / NAME
    if not path.exists():
        raise ValueError(without_manifest(folder))
    record = read_json_object(path)
    if record.pop("format", None) != FORMAT:
        raise ValueError(f"{path}: must have the format {FORMAT} of this version")
    try:
        manifest = Manifest(**record)
    except TypeError as error:
        raise ValueError(f"{path}: must be a manifest as a run writes it: {error}") from None
    require_valid(manifest, path)
    return manifest


def without_manifest(folder: Path) -> str:
    """The error message for a folder without a manifest."""
    if (folder / "training_state.safetensors").exists():
        return (
            f"{folder}: holds a run of an older version without {NAME}, which cannot be resumed: "
            f"start a new run from its adapter with --init-adapter {folder}"
        )
    return f"{folder}: must hold a run, and has no {NAME}"


def require_valid(manifest: Manifest, path: Path) -> None:
    objects = (manifest.settings, manifest.identity, manifest.versions, manifest.to_remove)
    finished = {} if manifest.finished is None else manifest.finished
    has_objects = all(isinstance(value, dict) for value in (*objects, finished))
    if not has_objects or not isinstance(manifest.written, list):
        raise ValueError(f"{path}: must be a manifest as a run writes it")
    for name in (*finished, *manifest.to_remove, *manifest.written):
        if name not in FILES:
            raise ValueError(f"{path}: must name only files that a run writes, got {name!r}")


def write(folder: Path, manifest: Manifest) -> None:
    with atomic_write(folder / NAME) as part:
        part.write_text(json.dumps({"format": FORMAT, **asdict(manifest)}, indent=2) + "\n", encoding="utf-8")


def finish(folder: Path) -> None:
    """Record the digests of the run's files, which marks the run as finished."""
    manifest = read(folder)
    digests = {name: digest(folder / name) for name in manifest.written if is_regular(folder / name)}
    write(folder, replace(manifest, finished=digests))


def register(folder: Path, *names: str) -> None:
    """Record, before they are written, that these files are the run's; ValueError where one already exists.

    This distinguishes the run's files from a user's files of the same names.
    """
    manifest = read(folder)
    new = [name for name in names if name not in manifest.written]
    for name in new:
        if os.path.lexists(folder / name):
            raise ValueError(f"{folder / name}: was not written by the run in this folder: move it away")
    if new:
        write(folder, replace(manifest, written=[*manifest.written, *new]))


def require_own_files(folder: Path) -> None:
    """ValueError where a file or folder that is not the run's has the name of one of its files."""
    written = read(folder).written
    for name in FILES:
        path = folder / name
        if os.path.lexists(path) and name not in written:
            raise ValueError(f"{path}: was not written by the run in this folder: move it away")
        if os.path.lexists(path) and not is_regular(path):
            raise ValueError(f"{path}: must be the regular file that the run wrote")


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_unchanged(folder: Path, name: str, sha256: str) -> bool:
    """Whether the file has this digest, and neither it nor its folder is a link."""
    path = folder / name
    is_own = is_regular(path) and ("/" not in name or not path.parent.is_symlink())
    return is_own and digest(path) == sha256


def remove_previous_run(folder: Path) -> None:
    """Remove the unchanged files of the run that this one replaces."""
    manifest = read(folder)
    for name, sha256 in manifest.to_remove.items():
        if is_unchanged(folder, name, sha256):
            (folder / name).unlink()
    best = folder / "best"
    if manifest.to_remove and best.is_dir() and not best.is_symlink() and not any(best.iterdir()):
        best.rmdir()
    if manifest.to_remove:
        write(folder, replace(manifest, to_remove={}))
