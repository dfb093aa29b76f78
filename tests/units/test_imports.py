"""Who may import whom: arrows point down, and the oracle shares no logic with its subject."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mlx_impl

ROOT = Path(__file__).resolve().parents[2]
PATTERN = ""  # the modules at the top of mlx_impl
# Each folder, and the folders whose modules it may import beside its own.
MAY_IMPORT = {
    PATTERN: (),
    "disk": (),
    "machine": (),
    "fast": (PATTERN,),
    "text": (PATTERN, "disk"),
    "files": (PATTERN, "disk", "machine", "text"),
    "run": (PATTERN, "disk", "machine", "fast", "files"),
    "cli": (PATTERN, "disk", "machine", "fast", "text", "files", "run"),
}


def dotted(path: Path) -> str:
    """mlx_impl/cli/train.py -> mlx_impl.cli.train"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = dotted(path).rsplit(".", node.level)[0] if node.level else ""
            stem = ".".join(filter(None, (base, node.module)))
            yield from (stem, *(f"{stem}.{alias.name}" for alias in node.names))


@pytest.mark.parametrize("path", sorted((ROOT / "mlx_impl").rglob("*.py")), ids=dotted)
def test_mlx_impl_imports_no_torch_no_mlx_lm_and_no_reference(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported(path)}
    assert roots.isdisjoint({"torch", "mlx_lm", "transformers", "peft", "reference", "tests"})


@pytest.mark.parametrize("path", sorted((ROOT / "reference").glob("*.py")), ids=lambda path: path.name)
def test_the_reference_imports_no_mlx_and_of_mlx_impl_only_its_configuration(path: Path) -> None:
    names = set(imported(path))
    assert not any(name.split(".")[0] == "mlx" for name in names)
    ours = {name for name in names if name.startswith("mlx_impl")}
    assert all(name.startswith("mlx_impl.config") for name in ours)


def modules() -> dict[str, Path]:
    """The modules of mlx_impl by dotted name; packages and the program itself left out."""
    paths = (ROOT / "mlx_impl").rglob("*.py")
    return {dotted(p).removeprefix("mlx_impl."): p for p in paths if p.stem not in ("__init__", "__main__")}


def imported_modules(path: Path) -> set[str]:
    """Those of mlx_impl that it imports, also inside functions."""
    return {name.removeprefix("mlx_impl.") for name in imported(path)} & modules().keys()


def folder_of(module: str) -> str:
    return module.partition(".")[0] if "." in module else PATTERN


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_from_folders_below_its_own(name: str) -> None:
    folder = folder_of(name)
    used = {folder_of(module) for module in imported_modules(modules()[name])}
    assert used <= {folder, *MAY_IMPORT[folder]}


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: imported_modules(path) for name, path in modules().items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_importing_the_package_imports_no_mlx() -> None:
    code = "import sys, mlx_impl, mlx_impl.config, mlx_impl.__main__; sys.exit('mlx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_public_name_loads() -> None:
    assert sorted(mlx_impl.HOMES) == mlx_impl.__all__
    for name in mlx_impl.__all__:
        assert getattr(mlx_impl, name) is getattr(mlx_impl, name)
        assert not inspect.ismodule(getattr(mlx_impl, name)), f"{name} is a module's name too"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mlx_impl.nothing  # noqa: B018
