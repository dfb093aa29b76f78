"""The command `lora-ladder`: an adapter climbs; the report is on the screen, in JSON or HTML if asked for."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.lora_ladder.climb import FILES, run
from tests.lora_ladder.help_text import epilog
from tests.lora_ladder.here import ALIASES, FOLDER
from tests.lora_ladder.interrupts import sigterm_interrupts
from tests.lora_ladder.loading import load_trainer
from tests.lora_ladder.output import OutputError, printable, require_writable, write
from tests.lora_ladder.page import MARK, page
from tests.lora_ladder.plugin import Ladder, rung_of
from tests.lora_ladder.progress import Progress
from tests.lora_ladder.record import record_of
from tests.lora_ladder.skeleton import write_skeleton
from tests.lora_ladder.summary import header_lines

EXIT = {"no divergence": 0, "first divergence": 1, "nothing was judged": 3}
UNUSABLE, INTERRUPTED = 2, 130
JSON_MARK = '{\n  "schema": '


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status, as `--help` explains it."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["init"]:
        return initialize(given[1:])
    options = parser().parse_intermixed_args(given)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the adapter's folder, as with python -m
    try:
        return judge(options)
    except (pytest.UsageError, OutputError) as error:
        print(f"lora-ladder: {error}", file=sys.stderr)
        return UNUSABLE


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-ladder",
        usage="lora-ladder MODULE:CLASS [CLAIM ...] [options]\n       lora-ladder init [FILE]",
        description="Is this LoRA trainer right, and if not, what is the first thing that differs?",
        epilog=epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("trainer", metavar="MODULE:CLASS", help="the adapter, or: reference")
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help="only these, as a replay names them")
    parser.add_argument("--rungs", metavar="N[-M]", help="only these rungs, judged alone")
    parser.add_argument("--keep-going", action="store_true", help="also judge rungs above a failed one")
    parser.add_argument("--quick", action="store_true", help="leave out what takes long, as rung 18 does")
    parser.add_argument("--draw", type=int, default=0, metavar="N", help="other random weights and rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result for other programs")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to send to someone")
    return parser


def judge(options: argparse.Namespace) -> int:
    """Raises UsageError or OutputError before anything is judged."""
    if options.draw < 0:
        raise pytest.UsageError(f"--draw must be at least 0, got {options.draw}")
    if options.claims and options.rungs is not None:
        raise pytest.UsageError("give claims or --rungs, not both: claims have their rung in their name")
    claims = [claim_of(name) for name in options.claims] or [str(path) for path in files(options.rungs)]
    if options.json and options.html and options.json.absolute() == options.html.absolute():
        raise pytest.UsageError(f"--json and --html must be two files, got {options.json} twice")
    require_writable(options.json, JSON_MARK)
    require_writable(options.html, MARK)
    trainer = ALIASES.get(options.trainer, options.trainer)
    load_trainer(trainer, "the trainer")
    wanted = [*claims, "--draw", str(options.draw)]
    wanted += ["--keep-going"] * options.keep_going + ["-m", "not slow"] * options.quick
    with sigterm_interrupts():
        ladder = climbed(trainer, wanted)
        try:
            record = record_of(ladder)
        except KeyboardInterrupt:  # while the culprit was looked for
            ladder.is_interrupted = True
            record = record_of(ladder)
    if options.json:
        write(options.json, json.dumps(record, indent=2, allow_nan=False) + "\n")
    if options.html:
        write(options.html, page(record))
    print(*map(encodable, record["summary"]), sep="\n")
    print(*map(encodable, header_lines(ladder)[2:]), sep="\n")
    return INTERRUPTED if ladder.is_interrupted else EXIT[record["verdict"]]


def encodable(line: str) -> str:
    """The line without what a terminal obeys; what its encoding has not, such as a surrogate, is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    return printable(line).encode(encoding, "backslashreplace").decode(encoding)


def climbed(trainer: str, wanted: list[str]) -> Ladder:
    """Shows the climb on the screen."""
    screen = sys.stdout
    try:
        ladder = run(trainer, wanted, plugins=[Progress(screen)])
    except RuntimeError as error:
        raise pytest.UsageError(sentence_of(str(error))) from None
    if ladder.exit_status == pytest.ExitCode.INTERNAL_ERROR:
        raise pytest.UsageError("the climb broke off, because pytest had an internal error")
    return ladder


def sentence_of(output: str) -> str:
    """pytest's last error; a climb that ran no claim has one."""
    errors = [line for line in output.splitlines() if line.startswith(("ERROR: ", "E  "))]
    missing = [line.rpartition("::")[2] for line in errors if line.startswith("ERROR: not found: ")]
    if missing:
        return f"there is no claim {missing[0]} with these cases"
    return errors[-1].removeprefix("ERROR: ").strip() if errors else "no claim was found"


def claim_of(name: str) -> str:
    """test_05_loss.py::test_a[untied] -> the same with the ladder's folder."""
    file = Path(name.partition("::")[0]).name
    if rung_of(FOLDER / file) is None or not (FOLDER / file).is_file():
        raise pytest.UsageError(f"a claim must be FILE::TEST as a replay names it, got {name!r}")
    return str(FOLDER / file) + "".join(name.partition("::")[1:])


def files(rungs: str | None) -> list[Path]:
    """The files of the rungs N to M; all of them for None."""
    if rungs is None:
        return FILES
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", rungs)
    chosen = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    paths = [path for path in FILES if rung_of(path) in chosen]
    if not paths:
        raise pytest.UsageError(f"--rungs must be N or N-M, with rungs from 0 to 19, got {rungs!r}")
    return paths


def initialize(arguments: list[str]) -> int:
    """`lora-ladder init [FILE]`."""
    parser = argparse.ArgumentParser(prog="lora-ladder init", description="Write an adapter to fill in.")
    parser.add_argument("file", nargs="?", type=Path, default=Path("my_adapter.py"), metavar="FILE")
    file = parser.parse_args(arguments).file
    try:
        write_skeleton(file)
    except OutputError as error:
        print(f"lora-ladder: {error}", file=sys.stderr)
        return UNUSABLE
    print(f"wrote {file}; fill it in, then: lora-ladder {file.stem}:MyTrainer")
    return 0
