"""Build hook: gathers `lora-ladder` from this folder and from what it shares with the repository.

Every module comes from its one source. In the wheel all are under `lora_ladder`, and their imports are
renamed: `tests.derived` is `lora_ladder.derived` there. An sdist has the sources as they are, in
`repository/`.
"""

from __future__ import annotations

import ast
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HERE = Path(__file__).resolve().parent
ROOT = HERE / "repository" if (HERE / "repository").is_dir() else HERE.parents[1]

# Package or module here -> its name where the ladder is installed. The longer names come first.
NAMES = {
    "tests.lora_ladder": "lora_ladder",
    "tests.trainers": "lora_ladder.trainers",
    "tests.derived": "lora_ladder.derived",
    "reference": "lora_ladder.reference",
    "mlx_impl": "lora_ladder.records",
}
# Files, as glob has them. Of mlx_impl only the records of a configuration and a batch, which need no MLX.
SOURCES = (
    "LICENSE",
    "tests/lora_ladder/*.py",
    "tests/lora_ladder/climb.ini",
    "tests/derived.py",
    "tests/trainers/__init__.py",
    "tests/trainers/reference.py",
    "reference/*.py",
    "mlx_impl/batching.py",
    "mlx_impl/config.py",
    "mlx_impl/data.py",
)
TRAPS = "tests/traps/test_trap_*.py"  # of them only the docstrings, which explain what a signature links
NOT_FOR_USERS = r"hatch_build\.py|test_(?!\d\d_)\w+\.py"  # of them the ladder's tests of itself
RECORDS = '"""The records that an adapter is given: configurations and batches."""\n'


class GatherSources(BuildHookInterface):
    """Adds each module to the wheel or the sdist."""

    folder: str | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            raise ValueError("lora-ladder cannot be installed as editable: its imports are renamed")
        included = build_data["force_include"]
        if self.target_name == "sdist":
            paths = [*sources(), *ROOT.glob(TRAPS)]
            included |= {str(path): f"repository/{path.relative_to(ROOT).as_posix()}" for path in paths}
            return
        self.folder = tempfile.mkdtemp()
        for number, (name, text) in enumerate(modules().items()):
            file = Path(self.folder) / str(number)
            file.write_text(text, encoding="utf-8")
            included[str(file)] = name

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self.folder:
            shutil.rmtree(self.folder)


def sources() -> Iterator[Path]:
    """The files in the repository."""
    for pattern in SOURCES:
        paths = sorted(ROOT.glob(pattern))
        yield from (path for path in paths if not re.fullmatch(NOT_FOR_USERS, path.name))


def modules() -> dict[str, str]:
    """The text of each file of the wheel, by its path there."""
    texts = {installed(path): renamed(path.read_text(encoding="utf-8")) for path in sources()}
    return {**texts, **trap_notes(), "lora_ladder/records/__init__.py": RECORDS}


def trap_notes() -> dict[str, str]:
    """The docstring of each trap, which trap_notes.py reads."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob(TRAPS))}
    return {f"lora_ladder/traps/{n}.txt": f"{ast.get_docstring(ast.parse(t))}\n" for n, t in texts.items()}


def installed(path: Path) -> str:
    """tests/derived.py -> lora_ladder/derived.py"""
    name = path.relative_to(ROOT).as_posix()
    if name == "LICENSE":
        return "lora_ladder/LICENSE"
    for here, there in NAMES.items():
        folder = here.replace(".", "/")
        if name.startswith((f"{folder}/", f"{folder}.")):
            return there.replace(".", "/") + name.removeprefix(folder)
    raise ValueError(f"every source must be in a package that has a name in the wheel, got {name}")


def renamed(text: str) -> str:
    """The text with the imports of the installed package."""
    for here, there in NAMES.items():
        text = re.sub(rf"(?m)^(\s*(?:from|import) ){re.escape(here)}\b", rf"\g<1>{there}", text)
    return text
