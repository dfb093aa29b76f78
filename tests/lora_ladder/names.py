"""Names that a user gives, of an adapter or of claims: a wrong one is refused, and the nearest is named.

Nothing heavy is imported here, so that a mistake is refused at once.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.lora_ladder.here import ALIASES, FILES, FOLDER, rung_of


class Unusable(Exception):
    """One sentence: a name or an option that cannot be used."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean the nearest?", or nothing."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def require_module_and_class(name: str, option: str) -> None:
    """Raises Unusable unless the name has the form module:Class."""
    is_path = bool(re.search(r"[/\\\\]|\.py:", name))
    if is_path or not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        hint = ", with a module as import has it, not a path" if is_path else ""
        known = " or ".join(ALIASES)
        near = "" if ":" in name else did_you_mean(name, (*ALIASES, "init"))
        raise Unusable(f"{option} must be module:Class{hint}, or {known}, got {name!r}{near}")


def require_module(name: str, option: str) -> None:
    """Raises Unusable if Python finds no module of this name; the module itself is not imported."""
    module = name.partition(":")[0]
    root = module.partition(".")[0]
    if root not in sys.modules and importlib.util.find_spec(root) is None:
        near = did_you_mean(root, (path.stem for path in Path.cwd().glob("*.py")))
        raise Unusable(f"{option} {name}: ModuleNotFoundError: No module named {root!r}{near}")
    if module == root and root not in sys.modules:
        require_class_in_source(name, option)


def require_class_in_source(name: str, option: str) -> None:
    """Raises Unusable if the module's text does not have the class's name, nor any way to make it."""
    module, _, class_name = name.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or not str(spec.origin).endswith(".py"):
        return
    text = Path(str(spec.origin)).read_text(encoding="utf-8", errors="replace")
    if not re.search(rf"\b{class_name}\b|import \*|__getattr__|globals|setattr|exec", text):
        near = did_you_mean(class_name, re.findall(r"^class (\w+)", text, re.MULTILINE))
        raise Unusable(f"{option} {name}: there is no class {class_name} in {spec.origin}{near}")


def claim_of(name: str) -> str:
    """test_05_loss.py::test_a[untied] -> the same with the ladder's folder. Raises Unusable."""
    file, separator, test = name.partition("::")
    path = FOLDER / Path(file).name
    if rung_of(path) is None or not path.is_file():
        near = did_you_mean(Path(file).name, [one.name for one in FILES]) or of_another_file(file)
        raise Unusable(f"a claim must be FILE::TEST as a replay names it, got {name!r}{near}")
    function, tests = test.partition("[")[0], tests_of(path)
    if separator and function not in tests:
        near = did_you_mean(function, tests)
        raise Unusable(f"there is no claim {function} in {path.name}{near}")
    return str(path) + separator + test


def of_another_file(test: str) -> str:
    """Where a test is named without its file."""
    claims = {name: f"{path.name}::{name}" for path in FILES for name in tests_of(path)}
    near = difflib.get_close_matches(test.partition("[")[0], list(claims), 1)
    return f"; did you mean {claims[near[0]]}?" if near else ""


def tests_of(path: Path) -> list[str]:
    return re.findall(r"^(?:def )?(test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)


def files(rungs: str | None) -> list[Path]:
    """The files of the rungs N to M; all of them for None. Raises Unusable."""
    if rungs is None:
        return FILES
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", rungs)
    chosen = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    paths = [path for path in FILES if rung_of(path) in chosen]
    if not paths:
        raise Unusable(f"--rungs must be N or N-M, with rungs from 0 to 19, got {rungs!r}")
    return paths
