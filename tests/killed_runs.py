"""Kill training runs at every call that changes file names, and check that nothing is lost.

    python -m tests.killed_runs                # all moments of all scenarios
    python -m tests.killed_runs --random N     # N random moments of each scenario

After a kill the folder is unchanged, or its run resumes bit-exactly.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_impl.__main__ import main
from tests.kills import MAX_SECONDS, Ended, run_killed
from tests.tiny_folder import write_data, write_folder

FLAGS = ["--rank", "2", "--iters", "3", "--batch-size", "4", "--save-every", "1", "--steps-per-eval", "2",
         "--dropout", "0.1", "--num-questions", "1", "--blas", "off"]  # fmt: skip
# Measured values, which differ between equal runs.
MEASURED_PER_STEP = {"seconds", "peak_bytes"}
MEASURED_PER_RUN = {"step_seconds_median", "training_seconds", "peak_bytes", "run"}
USER_FILES = ("notes.txt", "best/photo.jpg")  # in the folder of the run


@dataclass(frozen=True)
class Scenario:
    """`before` prepares the folder `run`; `words` are the arguments of `train`, with the folder last."""

    before: Callable[[Bench, Path], object]
    words: tuple[str, ...]


class Bench:
    """The inputs, and the finished run that every killed and resumed run must equal."""

    def __init__(self, root: Path) -> None:
        self.root = root
        inputs = write_folder(root / "model"), write_data(root / "data")
        self.train = ["train", "--model", str(inputs[0]), "--data", str(inputs[1]), *FLAGS]
        self.whole, self.old, self.stopped = (root / name for name in ("whole", "old", "stopped"))
        for folder, seed in ((self.whole, "0"), (self.old, "9")):
            ended = run_killed(main, [*self.train, "--seed", seed, "--adapter-path", str(folder)])
            assert ended.code == 0, ended.output
        for name in USER_FILES:
            (self.old / name).write_text("mine")
        run_killed(main, [*self.train, "--adapter-path", str(self.stopped)], at=40)

    def command(self, scenario: Scenario, run: Path) -> list[str]:
        settings = ["train"] if "--resume" in scenario.words else self.train
        return [*settings, *scenario.words, str(run), "--blas", "off"]

    def complete(self, run: Path) -> None:
        """Complete the run as a user would: with --resume if it has started, else with the same command."""
        if is_unfinished(run):
            ended = run_killed(main, ["train", "--resume", str(run), "--blas", "off"])
        else:
            ended = run_killed(main, [*self.train, "--overwrite", "--adapter-path", str(run)])
        assert ended.code == 0, ended.output


def is_unfinished(run: Path) -> bool:
    manifest = run / "manifest.json"
    return manifest.exists() and json.loads(manifest.read_text())["finished"] is None


SCENARIOS = {
    "a new run": Scenario(lambda bench, run: None, ("--adapter-path",)),
    "a run that replaces another": Scenario(
        lambda bench, run: shutil.copytree(bench.old, run), ("--overwrite", "--adapter-path")
    ),
    "a resumed run": Scenario(lambda bench, run: shutil.copytree(bench.stopped, run), ("--resume",)),
}


def contents(path: Path) -> Any:
    """The content of a run's file without measured values."""
    if path.suffix == ".safetensors":
        arrays, metadata = mx.load(str(path), return_metadata=True)
        return {name: bytes(np.array(array)) for name, array in arrays.items()}, metadata
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: value for key, value in row.items() if key not in MEASURED_PER_STEP} for row in rows]
    if path.name == "report.json":
        return {k: v for k, v in json.loads(path.read_text()).items() if k not in MEASURED_PER_RUN}
    if path.name == "report.html":  # report.json as a page
        return path.read_text().count("<section>")
    return path.read_bytes()


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def require_same_run(run: Path, whole: Path) -> None:
    """The run has the same files with the same contents; user files may be there too, but nothing else."""
    expected = files(whole) - set(USER_FILES)
    assert files(run) - set(USER_FILES) == expected, files(run) ^ expected
    for name in sorted(expected - {"manifest.json"}):
        assert contents(run / name) == contents(whole / name), name


def require_nothing_lost(bench: Bench, scenario: str, run: Path) -> None:
    """After a kill the old run is unchanged, or the new run can be completed bit-exactly."""
    if scenario == "a run that replaces another":
        assert all((run / name).read_text() == "mine" for name in USER_FILES)
        if not is_unfinished(run) and contents(run / "manifest.json") == contents(
            bench.old / "manifest.json"
        ):
            for path in run.glob(".*"):  # the lock and the temporary files of a dead process
                path.rename(bench.root / "debris")
            require_same_run(run, bench.old)
    bench.complete(run)
    require_same_run(run, bench.whole)


def killed(bench: Bench, name: str, run: Path, at: int, when: str) -> Ended:
    shutil.rmtree(run, ignore_errors=True)
    SCENARIOS[name].before(bench, run)
    ended = run_killed(main, bench.command(SCENARIOS[name], run), at=at, when=when)
    if ended.was_killed:
        require_nothing_lost(bench, name, run)
    return ended


def killed_after(bench: Bench, name: str, run: Path, seconds: float) -> bool:
    shutil.rmtree(run, ignore_errors=True)
    SCENARIOS[name].before(bench, run)
    ended = run_killed(main, bench.command(SCENARIOS[name], run), seconds=seconds)
    if ended.was_killed:
        require_nothing_lost(bench, name, run)
    return ended.was_killed


def kill_at_random(bench: Bench, run: Path, count: int) -> int:
    """Kill `count` runs of each scenario, at random times within the duration of a run."""
    done = 0
    for name in SCENARIOS:
        start = time.monotonic()
        assert not killed_after(bench, name, run, MAX_SECONDS)
        duration = time.monotonic() - start
        rng = random.Random(name)
        done += sum(killed_after(bench, name, run, duration * rng.random()) for _ in range(count))
    return done


def kill_at_every_moment(bench: Bench, run: Path) -> int:
    count = 0
    for name in SCENARIOS:
        at, is_killed = 0, True
        while is_killed:
            at += 1
            for when in ("before", "after"):
                is_killed = killed(bench, name, run, at, when).was_killed
                count += is_killed
        print(f"{name}: killed before and after each of {at - 1} calls", flush=True)
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--random", type=int, metavar="N", help="only N random moments of each scenario")
    number = parser.parse_args().random
    with tempfile.TemporaryDirectory() as folder:
        bench, run = Bench(Path(folder)), Path(folder, "run")
        count = kill_at_every_moment(bench, run) if number is None else kill_at_random(bench, run, number)
    print(count, "kills, nothing lost")
