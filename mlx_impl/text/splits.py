"""The training, validation, test and control data of a folder."""

from __future__ import annotations

from pathlib import Path

from .data_folder import find_files, other_spellings, require_files
from .rows import DataFile, Reading, read_data_file


def read_split(folder: Path, name: str, reading: Reading) -> DataFile:
    """The data that must be there; ValueError where there is none."""
    return read_data_file(require_files(folder, name), reading)


def read_optional_split(folder: Path, name: str, reading: Reading) -> DataFile:
    """The data, or none where the folder has no such file, or an empty one."""
    files = find_files(folder, name)
    if not files:
        return DataFile()
    data = read_data_file(files, reading, may_be_empty=True)
    if not files[0].name.startswith((f"{name}.", f"{name}-")):
        data.notes.append(f"{files[0].name} is read as {name}.jsonl")
    others = other_spellings(folder, name)
    data.notes += [f"{other} is not read, because {files[0].name} is there" for other in others]
    return data
