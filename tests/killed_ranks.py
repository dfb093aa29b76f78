"""Kill a random rank of a run at a random moment: nobody hangs, and the run resumes to the bit.

python -m tests.killed_ranks 100        # kills 0 to 99; with a second number from that one on
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import ring
from tests.killed_runs import is_unfinished, require_same_run
from tests.tiny_folder import write_data, write_folder

ITERS = 40
FLAGS = ["--rank", "2", "--iters", str(ITERS), "--batch-size", "1", "--grad-accumulation-steps", "3",
         "--blas", "off", "--save-every", "5", "--steps-per-eval", "20", "--dropout", "0.1"]  # fmt: skip
NOTICED = 10.0  # seconds after which a launcher's SIGTERM ends those that wait for others to start


class Bench:
    """The inputs, the run that all must equal, and how long two ranks take for it."""

    def __init__(self, root: Path) -> None:
        self.root, self.whole = root, root / "whole"
        inputs = ["--model", str(write_folder(root / "model")), "--data", str(write_data(root / "data"))]
        self.train = ["mlx_impl", "train", *inputs, *FLAGS]
        self.alone(*self.train, "--adapter-path", str(self.whole))
        start = time.monotonic()
        ring.outputs(self.together(2, root / "timed"))
        self.seconds = time.monotonic() - start

    def together(self, num_ranks: int, run: Path) -> list[subprocess.Popen]:
        return ring.start(self.root, num_ranks, *self.train, "--distributed", "--adapter-path", str(run))

    def alone(self, *words: str) -> None:
        subprocess.run([sys.executable, "-m", *words], cwd=ring.ROOT, check=True, capture_output=True)

    def kill(self, chance: random.Random, run: Path) -> str:
        """Kill a rank, wait for the others, complete the run with one process; what happened in a line."""
        num_ranks = chance.choice((2, 3))
        ranks, victim = self.together(num_ranks, run), chance.randrange(num_ranks)
        after = self.wait(chance, run)
        ranks[victim].kill()
        killed = time.monotonic()
        while (
            live := [rank for rank in ranks if rank.poll() is None]
        ) and time.monotonic() < killed + NOTICED:
            time.sleep(0.05)
        if not run.exists():
            for rank in live:
                rank.terminate()
        codes = [code for code, _, _ in ring.outputs(ranks)]
        took = time.monotonic() - killed
        has_ended = codes[victim] == 0
        others = codes[:victim] + codes[victim + 1 :]
        assert has_ended or run_is_done(run) or all(others), f"exit codes {codes}"
        if is_unfinished(run):
            self.alone("mlx_impl", "train", "--resume", str(run), "--blas", "off")
        elif not run_is_done(run):
            self.alone(*self.train, "--adapter-path", str(run))
        require_same_run(run, self.whole)
        return f"rank {victim} of {num_ranks} after {after}: codes {codes}, {took:.1f} s"

    def wait(self, chance: random.Random, run: Path) -> str:
        """One time in four for seconds, of which a process needs most to start; else for an update."""
        seconds, updates = chance.uniform(0, self.seconds), chance.randrange(ITERS)
        if chance.randrange(4) == 0:
            time.sleep(seconds)
            return f"{seconds:.1f} s"
        deadline = time.monotonic() + ring.SECONDS
        while num_lines(run / "metrics.jsonl") < updates and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))  # anywhere in an update, a validation or a save
        return f"{updates} updates"


def num_lines(metrics: Path) -> int:
    try:
        return metrics.read_bytes().count(b"\n")
    except FileNotFoundError:
        return -1


def run_is_done(run: Path) -> bool:
    return (run / "manifest.json").exists() and not is_unfinished(run)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        for seed in range(int(sys.argv[2]) if sys.argv[2:] else 0, int(sys.argv[1])):
            run = Path(name) / f"run {seed}"
            print(f"{seed}: {bench.kill(random.Random(seed), run)}", flush=True)


if __name__ == "__main__":
    main()
