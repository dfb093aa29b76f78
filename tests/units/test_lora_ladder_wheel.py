"""The distribution `lora-ladder`: what its wheel holds, and that it runs where MLX is not."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.lora_ladder.climb import FILES
from tests.lora_ladder.here import FOLDER
from tests.lora_ladder.known_bugs import SIGNATURES

BUILD = "import sys; from hatchling.build import build_{0}; print(build_{0}(sys.argv[1]))"
NEEDS = {"numpy", "pytest", "torch"}
# Refuses what a user may not have, and this repository's packages, which an editable install offers.
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mlx", "mlx_lm", "mlx_impl", "tests", "reference"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""
ADAPTER = """
import importlib, pathlib, warnings
import lora_ladder
from lora_ladder import Batch, Dialect, LoRAConfig, ModelConfig, TrainConfig
from lora_ladder.trainers.reference import ReferenceTrainer

class MyTrainer(ReferenceTrainer):
    dialect = Dialect()
    def loss(self, batch: Batch):
        warnings.warn("soon to go", FutureWarning)
        return super().loss(batch)

for path in pathlib.Path(lora_ladder.__file__).parent.glob("*.py"):  # each imports without MLX
    if path.stem not in ("__main__", "conftest"):
        importlib.import_module(f"lora_ladder.{path.stem}")
"""
# A suite that makes warnings errors, has an option that pytest does not know, and a broken conftest.py.
OF_THE_USER = {
    "pytest.ini": "[pytest]\nfilterwarnings = error\naddopts = --no-such-option\n",
    "conftest.py": "raise RuntimeError('of the user')\n",
    "my_adapter.py": ADAPTER,
}


def build(kind: str, folder: Path, source: Path = FOLDER) -> Path:
    command = [sys.executable, "-c", BUILD.format(kind), str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("wheel", tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def installed(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the path, as site-packages is, and before it one that refuses MLX and this repository."""
    folder = tmp_path_factory.mktemp("site")
    wheel.extractall(folder)
    (folder / "sitecustomize.py").write_text(BLOCKER)
    return folder


def run(installed: Path, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_has_one_package_at_its_top(wheel: zipfile.ZipFile) -> None:
    """Nothing called `tests` or `reference` reaches site-packages."""
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert tops == {"lora_ladder", "lora_ladder-0.1.0.dist-info"}


def test_the_wheel_has_every_claim_and_none_of_the_ladders_tests_of_itself(wheel: zipfile.ZipFile) -> None:
    names = {name.removeprefix("lora_ladder/") for name in wheel.namelist()}
    tests = {name for name in names if name.startswith("test_")}
    assert tests == {path.name for path in FILES}
    assert "hatch_build.py" not in names and "LICENSE" in names


def test_the_wheel_explains_each_trap_that_a_signature_links(installed: Path, tmp_path: Path) -> None:
    """The tests themselves need MLX and are in the repository only."""
    links = {signature.link for signature in SIGNATURES if signature.link.startswith("tests/")}
    program = (
        "import sys; from lora_ladder.trap_notes import seen; print(*map(seen, sys.argv[1:]), sep='\\n')"
    )
    done = run(installed, tmp_path, "-c", program, *sorted(links), "mlx-lm#1697")
    *notes, other = done.stdout.splitlines()
    assert len(notes) == len(links) > 5 and other == "see mlx-lm#1697", done.stderr
    assert all(len(note) > 100 and "tests/" not in note for note in notes)


def test_the_wheel_imports_only_what_it_requires(wheel: zipfile.ZipFile) -> None:
    """Nothing of MLX, also inside functions, and none of the repository's own names."""
    allowed = {*sys.stdlib_module_names, *NEEDS, "lora_ladder", "_pytest"}
    for name in wheel.namelist():
        if name.endswith(".py"):
            roots = imported(wheel.read(name).decode())
            assert roots <= allowed, f"{name}: {roots - allowed}"


def imported(text: str) -> set[str]:
    """The top-level names of all absolute imports."""
    nodes = list(ast.walk(ast.parse(text)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(n.module) for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
    return {name.partition(".")[0] for name in names}


def test_the_wheel_requires_numpy_pytest_and_torch(wheel: zipfile.ZipFile) -> None:
    """tokenizers only with the extra `chat`."""
    (metadata,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    required = Parser().parsestr(wheel.read(metadata).decode()).get_all("Requires-Dist") or []
    always = {line.partition(">=")[0] for line in required if "extra ==" not in line}
    assert always == NEEDS


def test_a_wheel_built_from_the_sdist_is_the_same(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    sdist = build("sdist", tmp_path)
    subprocess.run(["tar", "-xzf", str(sdist), "-C", str(tmp_path)], check=True)
    again = zipfile.ZipFile(build("wheel", tmp_path, tmp_path / "lora_ladder-0.1.0"))
    assert {i.filename: i.CRC for i in again.infolist()} == {i.filename: i.CRC for i in wheel.infolist()}


def test_an_adapter_climbs_where_mlx_is_not_and_no_setting_of_the_user_judges_it(
    installed: Path, tmp_path: Path
) -> None:
    """Neither his pytest.ini, nor his conftest.py, nor PYTEST_ADDOPTS; and the loss warns."""
    for name, text in OF_THE_USER.items():
        (tmp_path / name).write_text(text)
    options = ("test_07_freezing.py::test_every_factor_changes[untied]", "--json", "climb.json")
    done = run(
        installed, tmp_path, "-m", "lora_ladder", "my_adapter:MyTrainer", *options, PYTEST_ADDOPTS="--no-such"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "climb.json").read_text())
    assert record["verdict"] == "no divergence" and record["counts"] == {"passed": 1}
    written = {path.name for path in tmp_path.iterdir()} - {*OF_THE_USER, "__pycache__"}
    assert written == {"climb.json"}


def test_the_version_is_that_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "-m", "lora_ladder", "--version")
    assert done.stdout.startswith("lora-ladder 0.1.0, mlx ") and done.returncode == 0, done.stderr


def test_the_plugin_does_nothing_unless_it_is_asked(installed: Path, tmp_path: Path) -> None:
    """A suite has its own tests only, and neither NumPy nor PyTorch was imported for it."""
    (tmp_path / "test_mine.py").write_text(
        "import sys\ndef test_one(): assert {'numpy', 'torch'}.isdisjoint(sys.modules)\n"
    )
    suite = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "lora_ladder.suite")
    done = run(installed, tmp_path, *suite, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_the_plugin_adds_a_test_for_each_rung_if_it_is_asked(installed: Path, tmp_path: Path) -> None:
    """Here each says why the trainer cannot be judged."""
    suite = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "lora_ladder.suite")
    asked = ("--lora-ladder", "no_such:Trainer")
    done = run(installed, tmp_path, *suite, *asked, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert "20 failed" in done.stdout, done.stdout + done.stderr
    assert "No module named 'no_such'" in done.stdout
