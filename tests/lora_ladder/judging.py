"""What `lora-ladder MODULE:CLASS` does once its options are checked: it climbs, and writes the reports."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence

import pytest

from tests.lora_ladder.climb import run
from tests.lora_ladder.interrupts import sigterm_interrupts
from tests.lora_ladder.loading import load_trainer
from tests.lora_ladder.names import Unusable, did_you_mean
from tests.lora_ladder.output import printable, write
from tests.lora_ladder.page import page
from tests.lora_ladder.plugin import Ladder
from tests.lora_ladder.progress import Progress
from tests.lora_ladder.record import record_of
from tests.lora_ladder.summary import header_lines

EXIT = {"no divergence": 0, "first divergence": 1, "nothing was judged": 3}
INTERRUPTED = 130


def judge(options: argparse.Namespace, trainer: str, claims: Sequence[str]) -> int:
    """The exit status. Raises Unusable before anything is judged, and OutputError."""
    try:
        load_trainer(trainer, "the trainer")
    except pytest.UsageError as error:
        raise Unusable(str(error)) from None
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
        raise Unusable(sentence_of(str(error), trainer, wanted)) from None
    if ladder.exit_status == pytest.ExitCode.INTERNAL_ERROR:
        raise Unusable("the climb broke off, because pytest had an internal error")
    return ladder


def sentence_of(output: str, trainer: str, wanted: list[str]) -> str:
    """pytest's last error; a climb that ran no claim has one."""
    errors = [line for line in output.splitlines() if line.startswith(("ERROR: ", "E  "))]
    missing = [line.rpartition("::")[2] for line in errors if line.startswith("ERROR: not found: ")]
    if missing:
        names = [name for name in wanted if name.rpartition("::")[2].startswith(missing[0])]
        return no_such_case(names[0], trainer)
    return errors[-1].removeprefix("ERROR: ").strip() if errors else "no claim was found"


class Collected:
    """A pytest plugin that keeps the names of the claims that were found."""

    names: Sequence[str] = ()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.names = [item.name for item in items]


def no_such_case(name: str, trainer: str) -> str:
    """A claim that has other cases than the one in brackets: the nearest."""
    claim, _, case = name.partition("[")
    collected = Collected()
    with contextlib.suppress(RuntimeError):  # no claim ran
        run(trainer, [claim, "--collect-only"], plugins=[collected])
    cases = [found.partition("[")[2].removesuffix("]") for found in collected.names]
    near = did_you_mean(case.removesuffix("]"), filter(None, cases))
    return f"there is no claim {name.rpartition('::')[2]} with these cases{near}"
