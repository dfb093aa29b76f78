"""Who may import whom: arrows point down, and the oracle shares no logic with its subject."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlx_impl

ROOT = Path(__file__).resolve().parents[2]
# fmt: off
ORDER = [  # a module may import those before it
    "config", "blas", "files", "places", "journal", "folders", "cpu_ops", "ops", "slots", "view", "recompute",
    "projection", "model", "precision", "quantized", "requantize", "targets", "lora", "loss", "rows",
    "batching", "data", "layout",
    "turns", "template_worker", "template_process", "template", "tokenizer", "examples", "optim", "state",
    "guard", "train", "memory_model", "address_space", "memory_limits", "pace", "trainer", "memory_check",
    "merging", "sampling", "generate", "streaming",
    "formats.gguf_file", "formats.gguf_config", "formats.gguf", "formats.gguf_vocabulary",
    "formats.gguf_tokenizer", "formats.hf_keys", "formats.hf_tokenizer", "formats.mlx_quantization",
    "formats.hf_config", "formats.safetensors", "formats.hub", "formats.hf_folder", "formats.factors",
    "formats.peft", "formats.mlx_lm", "formats.scale_folding", "formats.adapter_conversion",
    "checkpoint", "adapters", "fusing",
    "cli.commands", "cli.console", "cli.interrupt", "cli.answers", "cli.report", "cli.curve",
    "cli.config_file", "cli.lock", "cli.manifest", "cli.run_place", "cli.run_folder", "cli.flags", "cli.job",
    "cli.stops", "cli.summary", "cli.finetune", "cli.lora_flags", "cli.settings", "cli.train",
    "cli.evaluate", "cli.generate", "cli.inspect", "cli.convert", "cli.fuse", "cli.parser",
    "address_space_probe", "__main__",
]
# fmt: on


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


@pytest.mark.parametrize("name", ORDER)
def test_arrows_point_down(name: str) -> None:
    """Each module imports only modules that stand before it in the reading order."""
    allowed = set(ORDER[: ORDER.index(name)])
    path = ROOT / "mlx_impl" / f"{name.replace('.', '/')}.py"
    own = {n.removeprefix("mlx_impl.") for n in imported(path) if n.startswith("mlx_impl.")}
    assert {n for n in own if n in ORDER} <= allowed


def test_the_order_names_every_module() -> None:
    paths = (ROOT / "mlx_impl").rglob("*.py")
    modules = {dotted(path).removeprefix("mlx_impl.") for path in paths if path.stem != "__init__"}
    assert modules == set(ORDER)


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
