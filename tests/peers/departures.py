"""Every peer climbs the ladder, and what fails is compared with the table of what is known.

    python -m tests.peers.departures                  # all of the ladder, minutes a peer
    python -m tests.peers.departures mlx-lm --quick   # what is known to fail, and six claims that all pass
    python -m tests.peers.departures --markdown       # the table, as it stands in tests/peers/README.md

Each climb is a process of its own, as `lora-ladder` runs it. The exit status is 0 if every peer is as known.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.peers.departure import Departure, Peer
from tests.peers.expected import PEERS

ROOT = Path(__file__).resolve().parents[2]
# Claims that every peer here passes.
TELLTALE = (
    "test_02_layer.py::test_base_plus_adapter_equals_the_merged_weights[untied]",
    "test_04_forward.py::test_logits_equal_the_reference[untied]",
    "test_05_loss.py::test_the_loss_equals_the_reference[untied]",
    "test_06_gradient.py::test_every_gradient_equals_the_reference[untied]",
    "test_08_step.py::test_one_update_equals_the_reference[sgd]",
    "test_10_equivalences.py::test_recomputed_activations_change_nothing[untied]",
)
Record = dict[str, Any]  # of tests/lora_ladder/record.py


def climb(peer: Peer, *options: str, undeclared: str = "") -> Record:
    """The record of a climb. Raises RuntimeError with what `lora-ladder` says if nothing was judged."""
    program = (
        ["tests.peers.undeclared", peer.adapter, undeclared]
        if undeclared
        else ["tests.lora_ladder", peer.adapter]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # the matrices are tiny
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "climb.json"
        command = [sys.executable, "-m", *program, *options, "--keep-going", "--json", str(file)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"{peer.package} did not climb: {done.stderr.strip() or done.stdout[-2000:]}")
        return json.loads(file.read_text(encoding="utf-8"))


def quick_claims(peer: Peer) -> list[str]:
    """The two most telling claims of each departure, and those that every peer passes."""
    failing = [claim for d in peer.departures if not d.declared for claim in d.claims[:2]]
    return [*failing, *TELLTALE]


def reasons(record: Record) -> dict[str, str]:
    """What was wrong, by claim, for those that failed."""
    return {name_of(c["test"]): c["reason"] for c in record["claims"] if c["outcome"] in ("failed", "error")}


def name_of(test: str) -> str:
    """The claim without the folder."""
    file, _, rest = test.partition("::")
    return f"{Path(file).name}::{rest}"


def differences(peer: Peer, quick: bool) -> tuple[list[str], dict[str, str]]:
    """Sentences on what is not as known, and what was wrong with each failed claim."""
    claims = quick_claims(peer) if quick else []
    found = reasons(climb(peer, *claims))
    known = {claim for claim in peer.failing() if not quick or claim in claims}
    sentences = [f"{peer.package}: {claim} passes now" for claim in sorted(known - found.keys())]
    sentences += [f"{peer.package}: {claim} fails:\n{found[claim]}" for claim in sorted(found.keys() - known)]
    for departure in peer.declared():
        alone = reasons(climb(peer, *departure.claims, undeclared=departure.declared))
        found |= alone
        sentences += [
            f"{peer.package}: {claim} passes although {departure.declared} is not declared"
            for claim in departure.claims
            if claim not in alone
        ]
    return sentences, found


def figure(reason: str) -> str:
    """The error against its tolerance, from the report of a failed claim."""
    number = re.search(r"\|error\| (\S+), (?:\S+ of the )?tolerance (\S+)", reason)
    if number:
        return f"{number[1]} / {number[2]}"
    first, *others = reason.splitlines()
    if first.endswith("the first is") and others:  # of the tensors
        return others[0].strip()
    sentence = re.sub(r"^test_\w+(\[[^]]*\])?: ", "", first)  # without the claim's name
    return sentence.split(". ")[0]


def rows(peer: Peer, found: dict[str, str]) -> list[str]:
    """The lines of the table, in Markdown."""
    return [row(peer, departure, found) for departure in peer.departures]


def row(peer: Peer, departure: Departure, found: dict[str, str]) -> str:
    rung, number = "not asked", ""
    if departure.claims:
        first = departure.claims[0]
        rung = str(int(first[5:7])) + f", {len(departure.claims)} claims" * (len(departure.claims) > 1)
        rung += f", unless declared: `{departure.declared}`" if departure.declared else ""
        number = figure(found[first])
    name = departure.reproduction
    shown = f"[{name}](reproductions/{name}.py)" if name else ""
    return f"| {peer.package} {peer.version} | {departure.fact} | {rung} | {number} | {shown} |"


HEAD = "| peer | departure | rung | error / tolerance | alone |\n|---|---|---|---|---|"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.peers.departures", description=__doc__.split("\n")[0]
    )
    parser.add_argument("packages", nargs="*", metavar="PEER", help="only these, as pip names them")
    parser.add_argument(
        "--quick", action="store_true", help="only what is known to fail, and six claims more"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table")
    options = parser.parse_args(arguments)
    known = [peer.package for peer in PEERS]
    for package in options.packages:
        if package not in known:
            parser.error(f"a peer must be one of {', '.join(known)}, got {package}")
    wrong, table = [], [HEAD]
    for peer in PEERS:
        if not options.packages or peer.package in options.packages:
            sentences, found = differences(peer, options.quick)
            wrong += sentences
            if options.markdown and not sentences:
                table += rows(peer, found)
            print(f"{peer.package} {peer.version}: {'not as known' if sentences else 'as known'}", flush=True)
    print(*wrong, *(table if options.markdown else ()), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
