"""The documents: what they show is what is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.readme import README as BENCHMARKS
from benchmarks.readme import rows_of
from mlx_impl.cli.parser import make_parser
from tests.trainers.mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    *("README.md", "mlx_impl/README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md"),
    *("benchmarks/README.md", "benchmarks/NOTES.md"),
    *(f"tests/{folder}/README.md" for folder in ("lora_ladder", "trainers", "peers", "traps")),
]
TRAPS = ROOT / "tests" / "traps"
CLAIMS_TABLE = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
CLAIMS = re.findall(r"^\| (.+) \| \[(test_\w+)\]\((\S+\.py)\) \|$", CLAIMS_TABLE, re.MULTILINE)
PROGRAM = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
WIDTH, LINES, CODE_LINES = 120, 200, 15  # of the README; of its program, imports not counted
# The field's terms: a person who searches for one of them finds it in a document.
TERMS = """
unpadding, padding-free, prefix sharing, sequence packing, chunked cross-entropy, gradient accumulation,
micro-batch, gradient checkpointing, gradient clipping, attention mask, position ids, peak learning rate,
bit-exact resume, rollback, mutant, planted bug, LoRA, DoRA, MLX, PyTorch reference
"""


def proof(row: str) -> list[str]:
    """The cells of a row of the table of proof, without the first, which begins so, and the last."""
    (line,) = re.findall(rf"^\| {re.escape(row)}[^|]*\|(.*)\|$", README, re.MULTILINE)
    return [cell.strip() for cell in line.split("|")][:-1]


def test_there_are_claims() -> None:
    assert len(CLAIMS) >= 70
    assert CLAIMS_TABLE.count("| [test_") == len(CLAIMS)


@pytest.mark.parametrize(("claim", "test", "file"), CLAIMS, ids=[test for _, test, _ in CLAIMS])
def test_every_claim_has_its_test(claim: str, test: str, file: str) -> None:
    assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), claim


def test_every_trap_is_in_the_list_of_traps() -> None:
    listed = set(re.findall(r"\]\((test_trap_\w+\.py)\)", (TRAPS / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in TRAPS.glob("test_trap_*.py")}


def test_the_program_in_the_readme_runs_as_it_stands_and_learns(tmp_path: Path) -> None:
    """In a process of its own; its loss falls from that of a guess among 256 bytes. The seed is random."""
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    updates, losses = zip(*(map(float, line.split()) for line in done.stdout.splitlines()), strict=True)
    assert updates == tuple(range(1, 101)) and losses[0] > 4 and losses[-1] < 0.2


def test_the_program_in_the_readme_is_short_and_uses_public_names_only() -> None:
    code = [line for line in PROGRAM.splitlines() if line and not line.startswith(("import ", "from "))]
    assert len(code) <= CODE_LINES
    assert re.findall(r"\b_\w+|lambda| if ", PROGRAM) == []


def test_the_readme_is_short_and_narrow() -> None:
    lines = README.splitlines()
    assert len(lines) <= LINES
    assert [line for line in lines if len(line) > WIDTH] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_to_a_file_leads_somewhere(document: str) -> None:
    """Links in line and links by name."""
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)|^\[[^]]+\]: (\S+)$", text, re.MULTILINE)
    files = [in_line or by_name for in_line, by_name in targets]
    assert [file for file in files if not (path.parent / file).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_to_a_heading_has_its_heading(document: str) -> None:
    path = ROOT / document
    for file, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", path.read_text(encoding="utf-8")):
        text = (path.parent / file if file else path).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert anchor in [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("term", re.split(r",\s", TERMS.strip()))
def test_the_fields_terms_are_in_the_documents(term: str) -> None:
    texts = [(ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS]
    assert any(term.lower() in " ".join(text.split()).lower() for text in texts)


def test_the_readme_counts_the_mutants() -> None:
    """That each is caught at its rung is proven by tests/trainers/test_mutants.py."""
    assert proof("mutants (planted bugs) / caught at their rung")[0] == f"{len(MUTANTS)} / {len(MUTANTS)}"


@pytest.mark.parametrize(
    ("row", "part", "case"),
    [
        ("step, SmolLM2-135M in float32, two CPU cores", "table", None),
        ("step, TinyLlama-1.1B's shape in bfloat16, one H200", "gpu", "every position a target"),
    ],
)
def test_the_readmes_step_times_and_memory_are_those_of_the_benchmarks(
    row: str, part: str, case: str | None
) -> None:
    """In the README the row below a step time has its peak memory."""
    rows = [r for r in rows_of(BENCHMARKS.read_text(encoding="utf-8"), part) if r.get("case") == case]
    measured = [
        next(r for r in rows if r["trainer"].startswith(trainer))
        for trainer in ("mlx_impl", "mlx-lm", "PEFT")
    ]
    assert proof(row) == [r["step"] for r in measured]
    below = README.partition(f"| {row} |")[2].splitlines()[1]
    assert below.split(" | ")[1:4] == [r["peak"] for r in measured]


def test_the_readmes_right_answers_are_those_of_the_picture() -> None:
    data = json.loads((ROOT / "benchmarks/pictures/main_job.json").read_text(encoding="utf-8"))
    before, after = data["right"]["unseen"]
    assert proof("right answers in unseen phrasings, before and after")[0] == f"{before:.0%}, {after:.0%}"


def test_the_report_in_the_readme_is_a_part_of_the_ladders() -> None:
    """Line by line; tests/lora_ladder/test_report.py holds the whole report to what the ladder says."""
    whole = (ROOT / "tests/lora_ladder/README.md").read_text(encoding="utf-8").splitlines()
    (report,) = re.findall(r"```\n( +2 layer.*?)```", README, re.DOTALL)
    assert [line for line in report.splitlines() if line not in ("   ...", *whole)] == []


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
