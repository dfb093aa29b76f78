"""The documents: what they show is what is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import mlx_impl
from mlx_impl.cli.parser import make_parser
from mlx_impl.files import checkpoint
from tests.tiny_folder import write_folder
from tests.trainers.twins import TWINS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/NOTES.md"] + [
    f"tests/{folder}/README.md" for folder in ("ladder", "trainers", "peers", "traps")
]
CLAIMS = re.findall(r"^\| (.+) \| \[(test_\w+)\]\((\S+\.py)\) \|$", README, re.MULTILINE)


def without_indent(code: str) -> str:
    return "\n".join(line.strip() for line in code.splitlines() if line.strip())


def test_there_are_claims() -> None:
    assert len(CLAIMS) >= 20
    assert README.count("| [test_") == len(CLAIMS)


@pytest.mark.parametrize(("claim", "test", "file"), CLAIMS, ids=[test for _, test, _ in CLAIMS])
def test_every_claim_has_its_test(claim: str, test: str, file: str) -> None:
    assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), claim


def test_the_pattern_shown_is_the_pattern_that_runs() -> None:
    """The README's first Python block stands in train.py, line for line, and is at most ten lines of code."""
    pattern = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    code = (ROOT / "mlx_impl" / "train.py").read_text(encoding="utf-8")
    assert without_indent(pattern) in without_indent(code)
    assert len(without_indent(pattern).splitlines()) <= 10


def test_the_program_shown_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, but on the tiny model, and into a temporary folder."""
    program = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    tiny = checkpoint.load_model(write_folder(tmp_path))
    monkeypatch.setattr(mlx_impl, "load_model", lambda path: tiny)
    monkeypatch.setenv("MLX_IMPL_BLAS", "off")
    exec(program.replace('Path(".")', f"Path({str(tmp_path)!r})"), {})
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_to_a_file_leads_somewhere(document: str) -> None:
    path = ROOT / document
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_every_module_is_in_the_reading_order() -> None:
    modules = {path.name for path in (ROOT / "mlx_impl").rglob("*.py")} - {"__init__.py"}
    assert [name for name in sorted(modules) if name not in README] == []


def test_the_red_twins_are_counted() -> None:
    """That each is caught at its rung is the examination's to say: tests/trainers/test_red_twins.py."""
    public = sum(1 for twin in TWINS.values() if twin.source)
    assert f"| {len(TWINS)} | {len(TWINS)} | {len(TWINS)} |" in README
    assert f"holds {len(TWINS)} broken trainers, each a bug of a few lines, {public} of them met in" in README


def test_the_top_level_is_as_promised() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    visible = {name.split("/")[0] for name in tracked if not name.startswith(".")}
    assert visible == {
        *("reference", "mlx_impl", "tests", "benchmarks", "fixtures", "tox.ini", "README.md"),
        *("pyproject.toml", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"),
    }


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "pip install --quiet tox" in script and "-m tox\n" in script


def test_the_promised_flags_exist() -> None:
    """The command line that stays stable."""
    promised = {
        "train": "model data adapter-path iters batch-size learning-rate rank alpha dropout "
        "target-modules num-layers mask-prompt max-seq-length seed init-adapter optimizer weight-decay",
        "evaluate": "model data adapter-path",
        "generate": "model adapter-path max-tokens temperature",
    }
    for command, flags in promised.items():
        arguments = [command, *(["--prompt", "a"] if command == "generate" else [])]
        known = vars(make_parser().parse_args(arguments))
        missing = [flag for flag in flags.split() if flag.replace("-", "_") not in known]
        assert missing == [], command
        assert make_parser().parse_args([*arguments, "--json"]).json
